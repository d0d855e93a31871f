//! What caches of 1,000, 10,000 and 100,000 records take: time and memory to put one together, to write it, and to read
//! it again.
//!
//! Run it with `cargo xtask bench caches`. With a shape and a number of records as arguments it runs that once, for
//! profilers.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark talks on its terminal and fails by panicking"
)]

use std::process::Command;
use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use cache::LayerBlob;
use export::image::ExportLayer;
use oci::{Descriptor, Digest, media_type};
use remotecache::chains::{Chains, ItemResult};
use remotecache::config::CacheConfig;
use remotecache::export::write_config;
use remotecache::records::ImportedRecords;
use solver::RecordId;

const SIZES: [usize; 3] = [1_000, 10_000, 100_000];
/// Steps of one stage: of a hundred, or of all there are.
const SHAPES: [(&str, usize); 2] = [("stages", 100), ("deep", usize::MAX)];

type Cache = Chains<Arc<[ExportLayer]>>;

fn step(name: &str) -> Digest {
    RecordId::root(&Digest::sha256(name), 0).0
}

fn layer(name: &str) -> ExportLayer {
    ExportLayer {
        descriptor: Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::sha256(name), 1),
        diff_id: Digest::sha256(format!("plain {name}")),
        original_diff_id: Digest::sha256(format!("plain {name}")),
        providers: Vec::new(),
        description: "made".to_owned(),
        created_at: UNIX_EPOCH,
    }
}

/// Stages of so many steps on one base; every second step reads a part of the base as well.
fn make(records: usize, steps: usize) -> Cache {
    let mut chains = Cache::default();
    let base = chains.root(step("base"));
    let part = Some(Digest::sha256("part"));
    let mut last = base;
    for number in 1..records {
        let on = if number % steps == 0 { base } else { last };
        let mut inputs = vec![vec![(on, None)]];
        if number % 2 == 0 {
            inputs.push(vec![(base, part)]);
        }
        last = chains.add(step(&number.to_string()), &inputs).unwrap();
        let result = ItemResult {
            created_at: UNIX_EPOCH,
            value: [layer("base"), layer(&format!("layer {number}"))].into(),
        };
        chains.add_result(last, result);
    }
    chains
}

fn read(bytes: &[u8], layers: Vec<ExportLayer>) -> ImportedRecords {
    let blobs = layers.into_iter().map(|layer| {
        let blob = LayerBlob {
            descriptor: layer.descriptor.clone(),
            diff_id: layer.diff_id,
            providers: Vec::new(),
            description: String::new(),
            created_at: None,
        };
        (layer.descriptor.digest, blob)
    });
    let config: CacheConfig = serde_json::from_slice(bytes).unwrap();
    ImportedRecords::new(0, config, &blobs.collect()).unwrap()
}

/// The most memory that the process ever had, in KiB.
fn peak_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap().split_whitespace().next().unwrap().parse().unwrap()
}

fn run(shape: &str, records: usize) {
    let (_, steps) = SHAPES.into_iter().find(|(name, _)| *name == shape).unwrap();
    let before = peak_kib();
    let started = Instant::now();
    let chains = make(records, steps);
    let made = started.elapsed();
    let (config, layers) = write_config(&chains, |_| true);
    let bytes = oci::json::to_vec(&config).unwrap();
    drop(config);
    let written = started.elapsed();
    let imported = read(&bytes, layers);
    let was_read = started.elapsed();
    imported.extend(&mut make(records, steps));
    let exported = started.elapsed();
    assert_eq!(imported.results(), records - 1);
    println!(
        "{shape} {records:>6} records, {:>8} KiB: made in {made:.1?}, written in {:.1?}, read in {:.1?}, made and \
         joined again in {:.1?}; {} KiB of memory",
        bytes.len() / 1024,
        written - made,
        was_read - written,
        exported - was_read,
        peak_kib() - before
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|text| !text.starts_with("--"))
        .collect();
    if let [shape, records] = &arguments[..] {
        return run(shape, records.parse().unwrap());
    }
    // Each in a process of its own, for the memory's sake.
    for (shape, _) in SHAPES {
        for records in SIZES {
            let own = std::env::current_exe().unwrap();
            let ended = Command::new(own).args([shape, &records.to_string()]).status();
            assert!(ended.unwrap().success());
        }
    }
}
