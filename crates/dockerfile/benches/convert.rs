//! How long it takes to parse and convert a large Dockerfile: 2,000 lines in 100 stages, all of them needed.
//!
//! Run it with `cargo xtask bench dockerfile`. With the argument `--once` it converts once and measures nothing, for
//! profilers.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark talks on its terminal and fails by panicking"
)]

#[path = "../tests/suite/drive.rs"]
#[expect(dead_code, reason = "shared with the tests")]
mod drive;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dockerfile::Outcome;
use serde_json::{Value, json};

use drive::{Driver, request};

const STAGES: usize = 100;
const RUNS: usize = 50;

/// A stage of 20 lines that needs the one before it.
fn stage(at: usize) -> String {
    let from = match at {
        0 => "FROM alpine AS s0".to_owned(),
        _ => format!("FROM s{} AS s{at}", at / 2),
    };
    let previous = at.saturating_sub(1);
    let copy = if at == 0 {
        "COPY first /first".to_owned()
    } else {
        format!("COPY --from=s{previous} --chown=1000:1000 /out/{previous} /in/")
    };
    format!(
        "{from}
ARG VERSION=1.{at}
ARG TARGETARCH
ENV APP_HOME=/srv/app{at} \\
    APP_VERSION=${{VERSION:-none}}
WORKDIR ${{APP_HOME}}
# what the package manager needs
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/root/.cache,id=cache-${{TARGETARCH}} \\
    --mount=type=bind,source=tools,target=/tools \\
    make deps && \\
    make all
{copy}
LABEL org.example.stage=\"{at}\" org.example.version=\"$VERSION\"
RUN <<EOF
set -e
echo ${{APP_VERSION}} > /out/{at}
EOF
EXPOSE {}
CMD [\"/bin/app\", \"--stage\", \"{at}\"]
",
        8000 + at
    )
}

fn convert(dockerfile: &str, images: &Value) -> Outcome {
    let files = |name: &str| (name == "Dockerfile").then(|| dockerfile.as_bytes().to_vec());
    let mut driver = Driver {
        files: &files,
        images,
        sources: &Value::Null,
        policy: &Value::Null,
        newest: None,
        solved: Vec::new(),
        asked: Vec::new(),
    };
    driver
        .run(request(BTreeMap::new(), &["linux/amd64".to_owned()], &[]))
        .unwrap()
}

fn main() {
    let dockerfile: String = (0..STAGES).map(stage).collect();
    let images = json!({ "docker.io/library/alpine:latest": { "Config": {
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", "a".repeat(64))] },
    } } });
    if std::env::args().any(|argument| argument == "--once") {
        convert(&dockerfile, &images);
        return;
    }
    let mut times: Vec<Duration> = Vec::with_capacity(RUNS);
    let mut vertices = 0;
    for _ in 0..RUNS {
        let started = Instant::now();
        let outcome = convert(&dockerfile, &images);
        times.push(started.elapsed());
        if let Outcome::Build(build) = outcome {
            vertices = build.results[0].definition.def.len();
        }
    }
    times.sort();
    println!(
        "{} lines, {STAGES} stages, {vertices} vertices: {:.2?} at best, {:.2?} in the middle of {RUNS}",
        dockerfile.lines().count(),
        times[0],
        times[RUNS / 2]
    );
}
