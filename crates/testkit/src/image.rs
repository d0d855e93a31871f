//! Images built in memory, layer by layer.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use oci::{Descriptor, Digest, History, ImageConfig, Index, Manifest, Platform, RootFs, media_type};
use tar::{EntryType, Header};

/// A layer's tar archive under construction. Entries are written in the order of the calls, owned by root, with a
/// modification time of one day after the epoch.
#[derive(Debug, Default)]
pub struct LayerBuilder {
    tar: Vec<u8>,
}

impl LayerBuilder {
    /// Starts an empty layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file with mode 0644.
    #[must_use]
    pub fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.file_with_mode(path, content, 0o644)
    }

    /// Adds a regular file.
    #[must_use]
    pub fn file_with_mode(self, path: &str, content: impl AsRef<[u8]>, mode: u32) -> Self {
        self.entry(EntryType::Regular, path, "", content.as_ref(), mode)
    }

    /// Adds a directory with mode 0755.
    #[must_use]
    pub fn dir(self, path: &str) -> Self {
        self.entry(
            EntryType::Directory,
            &format!("{}/", path.trim_end_matches('/')),
            "",
            &[],
            0o755,
        )
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, &[], 0o777)
    }

    /// Adds a hard link to an earlier entry.
    #[must_use]
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, target, &[], 0o644)
    }

    /// Removes a path of the layers below.
    #[must_use]
    pub fn whiteout(self, path: &str) -> Self {
        let (dir, name) = path
            .rsplit_once('/')
            .map_or(("", path), |(dir, name)| (dir, name));
        let marker = if dir.is_empty() {
            format!(".wh.{name}")
        } else {
            format!("{dir}/.wh.{name}")
        };
        self.entry(EntryType::Regular, &marker, "", &[], 0o644)
    }

    /// Hides everything that layers below have in a directory.
    #[must_use]
    pub fn opaque(self, dir: &str) -> Self {
        self.entry(EntryType::Regular, &format!("{dir}/.wh..wh..opq"), "", &[], 0o644)
    }

    /// Adds any entry; paths are written as given, also hostile ones.
    #[must_use]
    pub fn entry(mut self, kind: EntryType, path: &str, link: &str, content: &[u8], mode: u32) -> Self {
        let mut header = Header::new_gnu();
        let raw = header.as_gnu_mut().expect("a GNU header");
        fill(&mut raw.name, path);
        fill(&mut raw.linkname, link);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(86_400);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.tar.extend_from_slice(header.as_bytes());
        self.tar.extend_from_slice(content);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
        self
    }

    /// Ends the archive.
    pub fn build(mut self) -> Layer {
        self.tar.resize(self.tar.len() + 1024, 0);
        Layer::from_tar(self.tar, media_type::OCI_LAYER_GZIP)
    }

    /// Ends the archive as a layer of another media type: `+gzip`, `.gzip` and uncompressed ones are known.
    pub fn build_as(mut self, media_type: &str) -> Layer {
        self.tar.resize(self.tar.len() + 1024, 0);
        Layer::from_tar(self.tar, media_type)
    }
}

fn fill(field: &mut [u8], text: &str) {
    assert!(text.len() <= field.len(), "{text}: too long for a fixture");
    field[..text.len()].copy_from_slice(text.as_bytes());
}

/// A layer's blob.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Describes the blob.
    pub descriptor: Descriptor,
    /// The blob.
    pub blob: Bytes,
    /// The uncompressed archive.
    pub tar: Bytes,
}

impl Layer {
    /// The layer of any bytes, hostile ones too; they are compressed if the media type says so.
    pub fn from_tar(tar: Vec<u8>, media_type: &str) -> Self {
        let blob = if media_type.ends_with("gzip") {
            let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
            gzip.write_all(&tar).expect("writing to memory");
            gzip.finish().expect("writing to memory")
        } else {
            tar.clone()
        };
        Self {
            diff_id: Digest::sha256(&tar),
            descriptor: Descriptor::of_bytes(media_type, &blob),
            blob: blob.into(),
            tar: tar.into(),
        }
    }

    /// A layer with one file of `size` bytes that do not compress well.
    pub fn bulky(path: &str, size: usize) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let content: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .take(size)
        .collect();
        LayerBuilder::new().file(path, content).build()
    }
}

/// An image under construction.
#[derive(Debug)]
pub struct ImageBuilder {
    config: ImageConfig,
    layers: Vec<Layer>,
    docker: bool,
}

impl Default for ImageBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl ImageBuilder {
    /// Starts an image without layers for linux/amd64, created at the epoch.
    pub fn new() -> Self {
        let mut config: ImageConfig = serde_json::from_str("{}").expect("every field has a default");
        config.created = Some("1970-01-01T00:00:00Z".to_owned());
        config.rootfs = RootFs {
            kind: "layers".to_owned(),
            diff_ids: Vec::new(),
        };
        config.set_platform(Platform::new("linux", "amd64"));
        Self {
            config,
            layers: Vec::new(),
            docker: false,
        }
    }

    /// Sets the platform.
    #[must_use]
    pub fn platform(mut self, platform: Platform) -> Self {
        self.config.set_platform(platform);
        self
    }

    /// Adds an environment variable, `NAME=value`.
    #[must_use]
    pub fn env(mut self, variable: &str) -> Self {
        self.config.config.env.push(variable.to_owned());
        self
    }

    /// Adds a layer with its history entry.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        let mut history: History = serde_json::from_str("{}").expect("every field has a default");
        history.created.clone_from(&self.config.created);
        history.created_by = format!("layer {}", self.layers.len());
        self.config.history.push(history);
        self.config.rootfs.diff_ids.push(layer.diff_id);
        self.layers.push(layer);
        self
    }

    /// Changes anything in the configuration.
    #[must_use]
    pub fn edit(mut self, edit: impl FnOnce(&mut ImageConfig)) -> Self {
        edit(&mut self.config);
        self
    }

    /// Uses Docker's media types for manifest and configuration.
    #[must_use]
    pub fn docker(mut self) -> Self {
        self.docker = true;
        self
    }

    /// Writes configuration and manifest.
    pub fn build(self) -> Image {
        let (manifest_type, config_type) = if self.docker {
            (media_type::DOCKER_MANIFEST, media_type::DOCKER_CONFIG)
        } else {
            (media_type::OCI_MANIFEST, media_type::OCI_CONFIG)
        };
        let platform = self.config.platform();
        let config: Bytes = serde_json::to_vec(&self.config)
            .expect("a configuration is JSON")
            .into();
        let config_descriptor = Descriptor::of_bytes(config_type, &config);
        let layers = self.layers.iter().map(|layer| layer.descriptor.clone()).collect();
        let mut manifest = Manifest::new(config_descriptor.clone(), layers);
        manifest.media_type = manifest_type.to_owned();
        let manifest: Bytes = serde_json::to_vec(&manifest).expect("a manifest is JSON").into();
        let mut descriptor = Descriptor::of_bytes(manifest_type, &manifest);
        descriptor.platform = Some(platform);
        Image {
            descriptor,
            manifest,
            config_descriptor,
            config,
            layers: self.layers,
        }
    }
}

/// An image in memory.
#[derive(Clone, Debug)]
pub struct Image {
    /// Describes the manifest, with the platform.
    pub descriptor: Descriptor,
    /// The manifest.
    pub manifest: Bytes,
    /// Describes the configuration.
    pub config_descriptor: Descriptor,
    /// The configuration.
    pub config: Bytes,
    /// The layers, bottom first.
    pub layers: Vec<Layer>,
}

/// Writes an OCI index of several images.
pub fn index(images: &[&Image]) -> (Descriptor, Bytes) {
    let index = Index::new(images.iter().map(|image| image.descriptor.clone()).collect());
    let bytes: Bytes = serde_json::to_vec(&index).expect("an index is JSON").into();
    (Descriptor::of_bytes(media_type::OCI_INDEX, &bytes), bytes)
}
