//! The image exporter: a result's image into the content store and, on request, to registries.

mod annotations;
mod attestations;
mod config;
pub mod layers;
pub mod options;
mod supplement;
mod writer;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use build::blocking::internal;
use build::error::BuildError;
use build::export::{ExportContext, ExportSource, Exported, Exporter, ExporterInstance, Finalize};
use oci::Descriptor;
use source::image::Images;

use super::push::{Push, push_image};
pub(super) use attestations::{is_inline_only, statement_files};
pub use layers::{ExportLayer, LayerExporter};
pub use options::{ImageOptions, LayerOptions};
pub use writer::{ImageWriter, WrittenImage};

/// Metadata and response: the image's names.
pub(super) const NAME_KEY: &str = "image.name";

/// Makes image exporters (`type=image`).
#[derive(Debug)]
pub struct ImageExporter {
    images: Arc<Images>,
    layers: LayerExporter,
}

impl ImageExporter {
    /// Pushes with the clients of `images`.
    pub fn new(images: Arc<Images>, layers: LayerExporter) -> Self {
        Self { images, layers }
    }
}

impl Exporter for ImageExporter {
    fn resolve(
        &self,
        _: usize,
        attrs: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError> {
        let mut options = ImageOptions {
            force_inline_attestations: true,
            ..ImageOptions::read(&attrs)?
        };
        if attrs.contains_key("attestation-inline") {
            options.force_inline_attestations = ImageOptions::read(&attrs)?.force_inline_attestations;
        }
        let push = options.take_flag("push")?.unwrap_or(false);
        let by_digest = options.take_flag("push-by-digest")?.unwrap_or(false);
        let insecure = options.take_flag("registry.insecure")?.unwrap_or(false);
        // There is no store of named images: what only concerns that is checked and has no effect, as with BuildKit's
        // OCI worker.
        for key in [
            "unpack",
            "store",
            "name-canonical",
            "unsafe-internal-store-allow-incomplete",
        ] {
            options.take_flag(key)?;
        }
        let dangling_prefix = options.rest.remove("dangling-name-prefix").unwrap_or_default();
        // The attribute's misspelling is BuildKit's.
        let dangling_only = options.take_flag("danging-name-empty-only")?.unwrap_or(false);
        Ok(Arc::new(ImageInstance {
            images: Arc::clone(&self.images),
            layers: self.layers.clone(),
            options,
            push: push.then_some(PushOptions { by_digest, insecure }),
            dangling: (!dangling_prefix.is_empty()).then_some((dangling_prefix, dangling_only)),
        }))
    }
}

#[derive(Clone, Copy, Debug)]
struct PushOptions {
    by_digest: bool,
    insecure: bool,
}

#[derive(Debug)]
struct ImageInstance {
    images: Arc<Images>,
    layers: LayerExporter,
    options: ImageOptions,
    push: Option<PushOptions>,
    /// Prefix of names of images that would have none; and whether only those get it.
    dangling: Option<(String, bool)>,
}

impl ImageInstance {
    /// The names of the image, separated by commas.
    fn names(&self, given: Option<String>, root: &Descriptor) -> String {
        let mut names = match given {
            Some(given) if self.options.name == "*" => given,
            _ => self.options.name.clone(),
        };
        if let Some((prefix, only_if_empty)) = &self.dangling
            && (!only_if_empty || names.is_empty())
        {
            if !names.is_empty() {
                names.push(',');
            }
            names.push_str(&format!("{prefix}@{}", root.digest));
        }
        names
    }
}

/// The response entries that all image exporters give.
pub(super) fn response(image: &WrittenImage) -> Result<BTreeMap<String, String>, BuildError> {
    let mut response = BTreeMap::new();
    response.insert("containerimage.digest".to_owned(), image.root.digest.to_string());
    if let Some(config) = image.config_digest {
        response.insert("containerimage.config.digest".to_owned(), config.to_string());
    }
    let descriptor = oci::json::to_vec(&image.root).map_err(internal)?;
    response.insert(
        "containerimage.descriptor".to_owned(),
        STANDARD.encode(descriptor),
    );
    Ok(response)
}

#[async_trait]
impl ExporterInstance for ImageInstance {
    fn name(&self) -> &'static str {
        "exporting to image"
    }

    async fn export(&self, ctx: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError> {
        let writer = ImageWriter::new(&self.layers, ctx, &self.options, source)?;
        let given = writer
            .metadata()
            .get(NAME_KEY)
            .map(|name| String::from_utf8_lossy(name).into_owned());
        let image = writer.write().await?;
        let mut response = response(&image)?;
        let names = self.names(given, &image.root);
        if !names.is_empty() {
            response.insert(NAME_KEY.to_owned(), names.clone());
        }
        let descriptor = image.root.clone();
        let held = image.held();
        let mut finish = Finish {
            images: Arc::clone(&self.images),
            layers: self.layers.clone(),
            image,
            targets: Vec::new(),
            by_digest: false,
            insecure: false,
        };
        if let Some(push) = self.push {
            finish.targets = names
                .split(',')
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect();
            finish.by_digest = push.by_digest;
            finish.insecure = push.insecure;
        }
        Ok(Exported {
            response,
            finalize: Some(Box::new(finish)),
            descriptor: Some(descriptor),
            held: Some(held),
        })
    }
}

/// The pushes that remain to be done.
struct Finish {
    images: Arc<Images>,
    layers: LayerExporter,
    image: WrittenImage,
    targets: Vec<String>,
    by_digest: bool,
    insecure: bool,
}

#[async_trait]
impl Finalize for Finish {
    async fn finalize(self: Box<Self>, ctx: &ExportContext) -> Result<BTreeMap<String, String>, BuildError> {
        for target in &self.targets {
            let push = Push {
                images: &self.images,
                layers: &self.layers,
                image: &self.image,
                target,
                by_digest: self.by_digest,
                insecure: self.insecure,
            };
            push_image(ctx, &push)
                .await
                .map_err(|error| error.context(format!("failed to push {target}")))?;
        }
        Ok(BTreeMap::new())
    }
}
