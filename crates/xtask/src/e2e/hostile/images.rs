//! Images whose layers, documents or configurations attack.

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use llb::pb;
use oci::{Descriptor, Digest, ImageConfig, media_type};
use testkit::image::{Image, ImageBuilder, Layer, LayerBuilder};
use testkit::registry::Action;

use super::archives::{ATTACKS, Outcome};
use super::client::{name, request};
use super::ops::{definition, exec, image, second};
use super::tarball::{Tarball, many};
use super::yard::{End, MARK, Yard};
use crate::e2e::fixture::{Lab, expect, fail, succeed};

/// A step that looks at an image at `/m`.
fn looking(lab: &Lab, reference: &str, script: &str) -> pb::Definition {
    let base = image(&lab.busybox());
    let from = image(reference);
    let step = exec(&[&base, &from], script, |exec, _| exec.mounts.push(second("/m")));
    definition(&[from, base, step])
}

fn of_layer(archive: Vec<u8>) -> Image {
    let layer = Layer::from_tar(archive, media_type::OCI_LAYER);
    ImageBuilder::new().layer(layer).build()
}

/// Stores an image under a name of its own; returns the name.
fn store(lab: &Lab, image: &Image) -> String {
    let repository = name("image");
    lab.images().add_image(&repository, "latest", image);
    format!("{}/{repository}:latest", lab.registry())
}

/// Stores an image with another manifest; returns its name.
fn store_with(lab: &Lab, image: &Image, spoil: impl FnOnce(String) -> String) -> String {
    let repository = name("image");
    lab.images().add_image(&repository, "honest", image);
    let manifest = spoil(String::from_utf8_lossy(&image.manifest).into_owned());
    let kind = &image.descriptor.media_type;
    lab.images()
        .add_manifest(&repository, Some("latest"), kind, manifest.into());
    format!("{}/{repository}:latest", lab.registry())
}

/// An image that is stored in its own way.
struct Stored {
    name: &'static str,
    store: fn(&Lab) -> String,
    end: Outcome,
}

const fn refused(name: &'static str, store: fn(&Lab) -> String, parts: &'static [&'static str]) -> Stored {
    Stored {
        name,
        store,
        end: Outcome::Refused(parts),
    }
}

const fn confined(name: &'static str, store: fn(&Lab) -> String, script: &'static str) -> Stored {
    Stored {
        name,
        store,
        end: Outcome::Confined(script),
    }
}

/// An image that is not to be complained of. Images of different content have no layer in common.
fn honest(content: &str) -> Image {
    spoiled(content, |_| {})
}

fn spoiled(content: &str, spoil: impl FnOnce(&mut ImageConfig)) -> Image {
    let layer = LayerBuilder::new().file("honest", content).build();
    ImageBuilder::new().layer(layer).edit(spoil).build()
}

/// An index that holds one document.
fn index_of(descriptor: &Descriptor) -> Bytes {
    let index = oci::Index::new(vec![descriptor.clone()]);
    oci::json::to_vec(&index).unwrap_or_default().into()
}

/// Whiteouts below a layer that has something to hide.
fn with_whiteouts(lab: &Lab, archive: Vec<u8>) -> String {
    let below = LayerBuilder::new()
        .dir("d")
        .file("d/x", "x")
        .file("y", "y")
        .build();
    let above = Layer::from_tar(archive, media_type::OCI_LAYER);
    store(lab, &ImageBuilder::new().layer(below).layer(above).build())
}

const STORED: &[Stored] = &[
    refused(
        "a manifest that is none",
        |lab| {
            store_with(lab, &honest("a manifest that is none"), |_| {
                "{\"layers\": 5}".to_owned()
            })
        },
        &["failed to parse"],
    ),
    refused(
        "a manifest of 20 MiB",
        |lab| {
            store_with(lab, &honest("a manifest of 20 MiB"), |manifest| {
                manifest + &" ".repeat(20 << 20)
            })
        },
        &["rejecting 20971", "byte manifest"],
    ),
    refused(
        "a layer of less than nothing",
        |lab| {
            store_with(lab, &honest("a layer of less than nothing"), |manifest| {
                manifest.replace("\"size\":", "\"size\":-")
            })
        },
        &["failed to parse"],
    ),
    refused(
        "a layer that is longer than it says",
        |lab| {
            let size = honest("a layer that is longer than it says").layers[0]
                .descriptor
                .size;
            let (old, new) = (format!("\"size\":{size}"), format!("\"size\":{}", size - 10));
            store_with(lab, &honest("a layer that is longer than it says"), |manifest| {
                manifest.replace(&old, &new)
            })
        },
        &["size"],
    ),
    refused(
        "a layer that is shorter than it says",
        |lab| {
            let size = honest("a layer that is shorter than it says").layers[0]
                .descriptor
                .size;
            let (old, new) = (format!("\"size\":{size}"), format!("\"size\":{}", size + 10));
            store_with(lab, &honest("a layer that is shorter than it says"), |manifest| {
                manifest.replace(&old, &new)
            })
        },
        &["unexpected size of sha256:"],
    ),
    confined(
        "an image that has a layer in common with one that lies about its size",
        |lab| store(lab, &honest("a layer that is longer than it says")),
        "[ -f /m/honest ]",
    ),
    refused(
        "a layer whose digest is a path",
        |lab| {
            let digest = honest("a layer whose digest is a path").layers[0]
                .descriptor
                .digest
                .to_string();
            let path = format!("sha256:../../../../tmp/{MARK}");
            store_with(lab, &honest("a layer whose digest is a path"), |manifest| {
                manifest.replace(&digest, &path)
            })
        },
        &["failed to parse"],
    ),
    refused(
        "a layer that is missing",
        |lab| {
            let image = honest("a layer that is missing");
            let reference = store(lab, &image);
            let repository = repository_of(&reference);
            lab.images()
                .remove_blob(&repository, &image.layers[0].descriptor.digest);
            reference
        },
        &["not found"],
    ),
    refused(
        "a configuration that is missing",
        |lab| {
            let image = honest("a configuration that is missing");
            let reference = store(lab, &image);
            lab.images()
                .remove_blob(&repository_of(&reference), &image.config_descriptor.digest);
            reference
        },
        &["not found"],
    ),
    refused(
        "a layer that is another one",
        |lab| {
            let reference = store(lab, &honest("a layer that is another one"));
            let path = format!(
                "{}/blobs/{}",
                repository_of(&reference),
                honest("a layer that is another one").layers[0].descriptor.digest
            );
            lab.images().fault("GET", &path, 1000, Action::Corrupt);
            reference
        },
        &["digest"],
    ),
    confined(
        "an image that has a layer in common with one whose layer is another",
        |lab| store(lab, &honest("a layer that is another one")),
        "[ -f /m/honest ]",
    ),
    refused(
        "a layer that unpacks to another one",
        |lab| {
            let image = spoiled("unpacks", |config| {
                config.rootfs.diff_ids = vec![Digest::sha256(b"other")];
            });
            store(lab, &image)
        },
        &["diff"],
    ),
    refused(
        "more layers than the configuration has",
        |lab| store(lab, &spoiled("more", |config| config.rootfs.diff_ids.clear())),
        &["layer"],
    ),
    refused(
        "fewer layers than the configuration has",
        |lab| {
            let image = spoiled("fewer", |config| {
                config.rootfs.diff_ids.push(Digest::sha256(b"x"));
            });
            store(lab, &image)
        },
        &["layer"],
    ),
    refused(
        "a layer of unknown type",
        |lab| {
            let kind = honest("a layer of unknown type").layers[0]
                .descriptor
                .media_type
                .clone();
            store_with(lab, &honest("a layer of unknown type"), |manifest| {
                manifest.replace(&kind, "application/vnd.evil+x")
            })
        },
        &["failed to get stream processor for application/vnd.evil+x: no processor for media-type"],
    ),
    refused(
        "a layer that is not compressed as it says",
        |lab| {
            let layer = Layer::from_tar(b"\x1f\x8bnot a stream".to_vec(), media_type::OCI_LAYER);
            store(lab, &ImageBuilder::new().layer(layer).build())
        },
        &["layer"],
    ),
    refused(
        "indexes in indexes",
        |lab| {
            let repository = name("image");
            let mut inner = lab
                .images()
                .add_image(&repository, "inner", &honest("indexes in indexes"));
            for _ in 0..10 {
                let index = index_of(&inner);
                inner = lab
                    .images()
                    .add_manifest(&repository, Some("latest"), media_type::OCI_INDEX, index);
            }
            format!("{}/{repository}:latest", lab.registry())
        },
        &["nested more than"],
    ),
    refused(
        "a deletion of the parent",
        |lab| with_whiteouts(lab, Tarball::new().file("d/.wh...", b"").end()),
        &["d/.wh...", "invalid whiteout name"],
    ),
    refused(
        "a deletion of nothing",
        |lab| with_whiteouts(lab, Tarball::new().file("d/.wh.", b"").end()),
        &["d/.wh.", "invalid whiteout name"],
    ),
    confined(
        "a deletion through a link that leads out",
        |lab| {
            let outside = lab.dir().join("outside");
            let tarball = Tarball::new().symlink("out", &outside.to_string_lossy());
            with_whiteouts(
                lab,
                tarball
                    .file("out/.wh.victim", b"")
                    .file("out/.wh..wh..opq", b"")
                    .file("../../.wh.y", b"")
                    .end(),
            )
        },
        "[ -L /m/out ] && [ ! -e /m/y ] && [ -f /m/d/x ]",
    ),
    confined(
        "everything deleted",
        |lab| {
            with_whiteouts(
                lab,
                Tarball::new().file(".wh..wh..opq", b"").file("z", b"z").end(),
            )
        },
        "[ \"$(ls /m)\" = z ]",
    ),
    confined(
        "an image that has a layer in common with one that is missing it",
        |lab| store(lab, &honest("a layer that is missing")),
        "[ -f /m/honest ]",
    ),
    confined(
        "forged marks of a deletion",
        |lab| {
            // A character device 0:0 is what an overlay hides a name with.
            let tarball = Tarball::new().header(b'3', "d/x", 0, |_| {});
            with_whiteouts(lab, tarball.end())
        },
        "ls /m/d && [ -f /m/y ]",
    ),
    confined(
        "a quarter of a gigabyte of nothing",
        |lab| {
            let size: u64 = 256 << 20;
            let zeros = vec![0; 1 << 20];
            let header = Tarball::new().header(b'0', "zeros", size, |_| {}).cut();
            let body = many(&zeros, 256);
            let blob = [super::tarball::gzip(&header), body].concat();
            let mut tar = header;
            tar.resize(tar.len() + (256 << 20) + 1024, 0);
            let layer = Layer {
                diff_id: Digest::sha256(&tar),
                descriptor: Descriptor::of_bytes(media_type::OCI_LAYER_GZIP, &blob),
                blob: blob.into(),
                tar: Bytes::new(),
            };
            store(lab, &ImageBuilder::new().layer(layer).build())
        },
        "[ $(stat -c %b /m/zeros) -lt 1000 ]",
    ),
];

/// The repository in a reference of this laboratory's.
fn repository_of(reference: &str) -> String {
    let path = reference.split_once('/').map_or("", |(_, path)| path);
    path.split(':').next().unwrap_or_default().to_owned()
}

/// Uses them all.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    let attacks = ATTACKS
        .iter()
        .map(|attack| (attack.name, store(lab, &of_layer((attack.make)(lab))), attack.end));
    let stored = STORED
        .iter()
        .map(|stored| (stored.name, (stored.store)(lab), stored.end));
    for (name, reference, end) in attacks.chain(stored) {
        let (end, script) = match end {
            Outcome::Refused(parts) => (End::Refused(parts), "true"),
            Outcome::Confined(script) => (End::Built, script),
        };
        let request = request(looking(lab, &reference, script));
        yard.case(name, end, |yard| yard.client.solve(request));
    }
    let configured = configurations(&yard);
    yard.close()?;
    configured
}

/// A base image with the tools of the honest one and another configuration.
fn base(lab: &Lab, spoil: impl FnOnce(&mut ImageConfig)) -> Result<String> {
    let image = crate::base_image::busybox_builder()?.edit(spoil).build();
    Ok(store(lab, &image))
}

/// A configuration that attacks, and the words of the error; none: it is built.
type Configuration = (
    &'static str,
    fn(&mut ImageConfig),
    &'static str,
    &'static [&'static str],
);

const CONFIGURATIONS: &[Configuration] = &[
    (
        "a working directory above the root",
        |config| config.config.working_dir = "../../../cooper-attack-w".to_owned(),
        "RUN [ \"$PWD\" = /cooper-attack-w ]",
        &[],
    ),
    (
        "a user that there is not",
        |config| config.config.user = "../../etc/passwd".to_owned(),
        "RUN true",
        &["../../etc/passwd"],
    ),
    (
        "a variable with a zero byte",
        |config| config.config.env.push("A=b\0c".to_owned()),
        "RUN true",
        &["a NUL byte in"],
    ),
    (
        "a trigger that makes another one",
        |config| config.config.on_build = vec!["ONBUILD RUN true".to_owned()],
        "RUN true",
        &[],
    ),
    (
        "a trigger that is another image",
        |config| config.config.on_build = vec!["FROM evil".to_owned()],
        "RUN true",
        &["FROM"],
    ),
    (
        "a platform that is none",
        |config| config.os = "\u{0}../..".to_owned(),
        "RUN true",
        &[],
    ),
];

/// Builds on images with hostile configurations.
fn configurations(yard: &Yard<'_>) -> Result<()> {
    for (what, spoil, instruction, words) in CONFIGURATIONS {
        let base = base(yard.lab, spoil)?;
        let dockerfile = format!("FROM {base}\n{instruction}\n");
        let context = yard.lab.context("configured", &[("Dockerfile", &dockerfile)])?;
        let mut build = yard.daemon.buildctl_build(&context);
        if words.is_empty() {
            succeed(&mut build).context(*what)?;
            continue;
        }
        let (code, message) = fail(&mut build).context(*what)?;
        ensure!(code == 1, "{what}: exit code {code}");
        for word in *words {
            expect(&message, word).context(*what)?;
        }
    }
    Ok(())
}
