//! Parses and converts any bytes as a Dockerfile. `cargo fuzz run convert` in the workspace's root; a corpus to start
//! with are the Dockerfiles below `crates/dockerfile/tests/golden`. Without a nightly compiler, in this directory:
//!
//! ```text
//! RUSTFLAGS="--cfg fuzzing -Copt-level=2 -Ccodegen-units=1 -Cpasses=sancov-module \
//!     -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
//!     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares" \
//!     cargo run --target x86_64-unknown-linux-gnu -- CORPUS -max_total_time=60
//! ```
//!
//! `cargo xtask fuzz` needs none of it and finds less: it mutates without looking at what the code does.
//!
//! The first byte chooses what is asked of the frontend, the rest is the Dockerfile.
#![no_main]

#[path = "../../crates/dockerfile/tests/suite/drive.rs"]
#[expect(dead_code, reason = "shared with the tests")]
mod drive;

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

use drive::{Driver, request};

/// Options by the first byte.
const ASKED: [(&str, &str); 8] = [
    ("", ""),
    ("requestid", "frontend.lint"),
    ("requestid", "frontend.outline"),
    ("requestid", "frontend.targets"),
    ("requestid", "frontend.convertllb"),
    ("platform", "windows/amd64"),
    ("platform", "linux/amd64,linux/arm/v7"),
    ("build-arg:SOURCE_DATE_EPOCH", "a"),
];

fuzz_target!(|bytes: &[u8]| {
    let Some((first, dockerfile)) = bytes.split_first() else {
        return;
    };
    let (name, value) = ASKED[usize::from(*first) % ASKED.len()];
    let options = BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let files = |name: &str| (name == "Dockerfile").then(|| dockerfile.to_vec());
    let images = json!({ "*": { "Config": {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", "a".repeat(64))] },
    } } });
    let mut driver = Driver {
        files: &files,
        images: &images,
        sources: &Value::Null,
        policy: &Value::Null,
        newest: None,
        solved: Vec::new(),
        asked: Vec::new(),
    };
    // Whatever it is, it has to end well or with a failure.
    let _ = driver.run(request(options, &["linux/amd64".to_owned()], &[]));
});
