//! Bills of materials, completed: which layer of the image each file is in.

use std::collections::BTreeMap;
use std::io::BufReader;

use build::blocking::{blocking, internal};
use build::error::BuildError;
use build::unlazy::FetchContext;
use bytes::Bytes;
use layer::compress::decompress;
use layer::tar::Reader;
use oci::Digest;
use serde_json::{Map, Value, json};

use super::layers::{ExportLayer, LayerExporter};

/// The predicate type that is completed.
pub const SPDX_PREDICATE: &str = "https://spdx.dev/Document";

/// Adds the layer to the comment of each file that has none, and this program to the document's creators. A document
/// that does not parse is left as it is.
pub async fn supplement(
    exporter: &LayerExporter,
    ctx: &FetchContext,
    layers: &[ExportLayer],
    content: Bytes,
) -> Result<Bytes, BuildError> {
    let Ok(Value::Object(mut document)) = serde_json::from_slice::<Value>(&content) else {
        return Ok(content);
    };
    let mut finder = Finder {
        exporter,
        ctx,
        pending: layers.to_vec(),
        found: BTreeMap::new(),
    };
    if let Some(Value::Array(files)) = document.get_mut("files") {
        for file in files.iter_mut().filter_map(Value::as_object_mut) {
            comment(&mut finder, file).await?;
        }
    }
    let info = document.entry("creationInfo").or_insert_with(|| json!({}));
    if let Value::Object(info) = info {
        let creators = info.entry("creators").or_insert_with(|| json!([]));
        if let Value::Array(creators) = creators {
            creators.push(Value::String(format!(
                "Tool: buildkit-{}",
                env!("CARGO_PKG_VERSION")
            )));
        }
    }
    Ok(serde_json::to_vec(&document).map_err(internal)?.into())
}

async fn comment(finder: &mut Finder<'_>, file: &mut Map<String, Value>) -> Result<(), BuildError> {
    // A comment of the scanner's own is free text: nothing can be added to it safely.
    if file
        .get("comment")
        .is_some_and(|comment| comment.as_str() != Some(""))
    {
        return Ok(());
    }
    let Some(name) = file.get("fileName").and_then(Value::as_str) else {
        return Ok(());
    };
    let name = name.trim_start_matches("./").trim_matches('/').to_owned();
    if let Some(layer) = finder.find(&name).await? {
        file.insert("comment".to_owned(), Value::String(format!("layerID: {layer}")));
    }
    Ok(())
}

/// Finds the uppermost layer that has a file. Layers are listed as needed, each once.
struct Finder<'a> {
    exporter: &'a LayerExporter,
    ctx: &'a FetchContext,
    /// Layers not listed yet, the uppermost last.
    pending: Vec<ExportLayer>,
    found: BTreeMap<String, Digest>,
}

impl Finder<'_> {
    async fn find(&mut self, name: &str) -> Result<Option<Digest>, BuildError> {
        loop {
            if let Some(found) = self.found.get(name) {
                return Ok(Some(*found));
            }
            let Some(layer) = self.pending.pop() else {
                return Ok(None);
            };
            let digest = layer.descriptor.digest;
            self.exporter
                .fetcher()
                .fetch_blob(self.ctx, &layer.descriptor, &layer.providers)
                .await?;
            let content = self.exporter.store().content().clone();
            for name in blocking(move || list(&content, &digest)).await? {
                self.found.entry(name).or_insert(digest);
            }
        }
    }
}

/// The names in a layer, without whiteouts.
fn list(content: &content::Store, digest: &Digest) -> Result<Vec<String>, BuildError> {
    let blob = content.reader(digest).map_err(internal)?;
    let (_, plain) = decompress(BufReader::new(blob.into_reader())).map_err(internal)?;
    let mut archive = Reader::new(plain);
    let mut names = Vec::new();
    while let Some(header) = archive.next_entry().map_err(internal)? {
        let Ok(name) = String::from_utf8(header.name) else {
            continue;
        };
        let name = name.trim_start_matches("./").trim_matches('/');
        if !name
            .rsplit('/')
            .next()
            .is_some_and(|base| base.starts_with(".wh."))
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}
