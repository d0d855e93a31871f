//! Input that means no good: it has to be refused or converted, in bounded time and without a panic.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use dockerfile::{Failure, Outcome};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::drive::{Driver, request};

fn images() -> Value {
    json!({ "docker.io/library/alpine:latest": { "Config": {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", "a".repeat(64))] },
    } } })
}

pub fn convert(dockerfile: &str, options: BTreeMap<String, String>) -> Result<Outcome, Box<Failure>> {
    convert_bytes(dockerfile.as_bytes(), options)
}

pub fn convert_bytes(dockerfile: &[u8], options: BTreeMap<String, String>) -> Result<Outcome, Box<Failure>> {
    let files = |name: &str| (name == "Dockerfile").then(|| dockerfile.to_vec());
    let images = images();
    let mut driver = Driver {
        files: &files,
        images: &images,
        sources: &Value::Null,
        policy: &Value::Null,
        newest: None,
        solved: Vec::new(),
        asked: Vec::new(),
    };
    driver.run(request(options, &["linux/amd64".to_owned()], &[]))
}

/// Repeats a line with a number in it up to a size.
fn repeat(start: &str, line: impl Fn(usize) -> String, bytes: usize) -> String {
    let mut text = start.to_owned();
    for at in 0.. {
        if text.len() >= bytes {
            break;
        }
        text.push_str(&line(at));
    }
    text
}

/// Many lines of the same kind.
fn many_lines(bytes: usize) -> Vec<(&'static str, String)> {
    let alpine = "FROM alpine\n";
    let lines = |line: &'static str| repeat(alpine, move |at| line.replace('#', &at.to_string()), bytes);
    vec![
        ("run", lines("RUN #\n")),
        ("env", lines("ENV a#=b\n")),
        ("same env", lines("ENV a=$a$a#\n")),
        ("env and run", lines("ENV a#=b\nRUN c\n")),
        ("arg", lines("ARG a#\n")),
        ("arg and run", lines("ARG a#\nRUN c\n")),
        ("undefined", lines("WORKDIR $a#\n")),
        ("undefined with names", lines("ENV b#=c\nWORKDIR $a#\n")),
        ("findings", lines("ENV abcdefgh=$abcdefgi\n")),
        ("findings of casing", lines("run x\nRUN y\n")),
        ("label", lines("LABEL a#=b\n")),
        ("expose", lines("EXPOSE 0-65535\n")),
        ("volume", lines("VOLUME a#\n")),
        ("onbuild", lines("ONBUILD RUN #\n")),
        ("copy", lines("COPY a# b\n")),
        ("link", lines("COPY --link a# b\n")),
        ("from image", lines("COPY --from=alpine a# b\n")),
        ("mounts", lines("RUN --mount=type=cache,target=/#  x\n")),
        ("heredocs", lines("RUN <<E\n#\nE\n")),
        (
            "stages",
            repeat("", |at| format!("FROM alpine AS s{at}\nRUN x\n"), bytes),
        ),
        (
            "chain",
            repeat(
                "FROM alpine AS s0\n",
                |at| format!("FROM s{at} AS s{}\nENV x{at}=1\n", at + 1),
                bytes,
            ),
        ),
        (
            "ladder",
            repeat(
                "FROM alpine AS s0\n",
                |at| format!("FROM alpine AS s{}\nCOPY --from=s{at} / /\n", at + 1),
                bytes,
            ),
        ),
        ("cycle", {
            let ring = |at: usize| format!("FROM alpine AS s{at}\nCOPY --from=s{} / /\n", at + 1);
            let ring = repeat("", ring, bytes);
            let last = ring.matches("FROM").count();
            format!("{ring}FROM alpine AS s{last}\nCOPY --from=s0 / /\n")
        }),
    ]
}

/// Variables that grow with each line, and triggers that multiply.
fn growing(bytes: usize) -> Vec<(&'static str, String)> {
    let alpine = "FROM alpine\n";
    let lines = |line: &'static str| repeat(alpine, move |at| line.replace('#', &at.to_string()), bytes);
    vec![
        ("double env", lines("ENV a=${a}${a}#\n")),
        ("double arg", lines("ARG a=${a}${a}#\n")),
        ("double default", lines("ENV a=${b:-${a}${a}#}\n")),
        ("double pattern", lines("ENV a=${a//x/xx}x\n")),
        (
            "double global",
            repeat("", |at| format!("ARG a=${{a}}${{a}}{at}\n"), bytes) + alpine,
        ),
        ("double label", lines("ENV a=${a}${a}#\nLABEL l#=$a$a$a$a\n")),
        (
            "double workdir",
            lines("WORKDIR a$PWD/b\nENV a=${a}x${a}\nWORKDIR $a\n"),
        ),
        ("deep workdir", lines("WORKDIR a\n")),
        ("deep workdir and run", lines("WORKDIR aaaa\nRUN x\n")),
        ("long user", {
            let user = "u".repeat((bytes / 2).min(60_000));
            repeat(
                &format!("FROM alpine\nUSER {user}\n"),
                |_| "RUN x\n".to_owned(),
                bytes,
            )
        }),
        ("empty stages", repeat("", |_| "FROM scratch\n".to_owned(), bytes)),
        ("triggers of a stage", {
            let start = repeat(
                "FROM alpine AS s0\n",
                |at| format!("ONBUILD ENV a{at}=b\n"),
                bytes / 2,
            );
            repeat(
                &start,
                |at| format!("FROM s0 AS t{at}\nCOPY --from=t{} / /\n", at.saturating_sub(1)),
                bytes,
            )
        }),
        ("triggers that need stages", {
            let start = repeat(
                "FROM alpine AS s0\n",
                |at| format!("ONBUILD COPY --from=i{at} / /\n"),
                bytes / 2,
            );
            repeat(
                &start,
                |at| format!("FROM s0 AS t{at}\nCOPY --from=t{} / /\n", at.saturating_sub(1)),
                bytes,
            )
        }),
        ("chained triggers", {
            repeat(
                "FROM alpine AS s0\n",
                |at| format!("ONBUILD RUN {at}\nFROM s{at} AS s{}\n", at + 1),
                bytes,
            )
        }),
        ("variables and copies", {
            let start = repeat(alpine, |at| format!("ENV e{at}=v\n"), bytes / 2);
            repeat(&start, |at| format!("COPY a{at} b\n"), bytes)
        }),
        ("variables and mistakes", {
            let start = repeat(alpine, |at| format!("ENV e{at}=v\n"), bytes / 2);
            repeat(&start, |at| format!("LABEL a=$u{at}\n"), bytes)
        }),
    ]
}

/// Few instructions of absurd length.
fn long_lines(bytes: usize) -> Vec<(&'static str, String)> {
    let long = |start: &str, word: &str| format!("FROM alpine\n{start}{}", word.repeat(bytes / word.len()));
    vec![
        ("empty lines", "\n".repeat(bytes)),
        ("comments", "# x\n".repeat(bytes / 4)),
        (
            "continuations",
            format!("FROM alpine\nRUN a {}", "\\\n".repeat(bytes / 2)),
        ),
        (
            "long run",
            format!("FROM alpine\nRUN {}", "aaaaaaa \\\n".repeat(bytes / 10)),
        ),
        (
            "long onbuild",
            format!("FROM alpine\n{}RUN x", "ONBUILD \\\n".repeat(bytes / 10)),
        ),
        (
            "nested",
            format!("FROM alpine\nENV A={}", "${A:-\\\n".repeat(bytes / 7)),
        ),
        (
            "nested pattern",
            format!(
                "FROM alpine\nENV A={}\nENV B=${{A#{}b}}",
                "a\\\n".repeat(bytes / 6),
                "*a\\\n".repeat(bytes / 8)
            ),
        ),
        (
            "many flags",
            format!("FROM alpine\nCOPY {} a b", "--exclude=a \\\n".repeat(bytes / 14)),
        ),
        (
            "many words",
            format!("FROM alpine\nENV {}", "a=b \\\n".repeat(bytes / 6)),
        ),
        (
            "many sources",
            format!("FROM alpine\nCOPY {} b/", "a \\\n".repeat(bytes / 4)),
        ),
        (
            "many heredocs",
            format!("FROM alpine\nRUN {}\n", "<<a \\\n".repeat(bytes / 6)),
        ),
        (
            "many ports",
            format!("FROM alpine\nEXPOSE {}", "1-65535 \\\n".repeat(bytes / 10)),
        ),
        ("json", format!("FROM alpine\nRUN {}", "[\\\n".repeat(bytes / 3))),
        ("quotes", long("ENV a=", "'\"")),
        ("long line", long("RUN ", "x")),
        ("long unknown", "x".repeat(bytes)),
        ("zeros", "\0".repeat(bytes)),
    ]
}

/// One instruction of many things that differ.
fn long_lists(bytes: usize) -> Vec<(&'static str, String)> {
    vec![
        ("many documents", documents("COPY", " /", bytes)),
        ("many documents of a command", documents("RUN", "", bytes)),
        (
            "many mounts of stages",
            numbered("FROM alpine\nRUN ", "--mount=from=i#,target=/# \\\n", "x", bytes),
        ),
        (
            "many caches",
            numbered(
                "FROM alpine\nRUN ",
                "--mount=type=cache,target=/# \\\n",
                "x",
                bytes,
            ),
        ),
        (
            "many secrets",
            numbered(
                "FROM alpine\nRUN ",
                "--mount=type=secret,id=#,env=e# \\\n",
                "x",
                bytes,
            ),
        ),
        (
            "many devices",
            numbered("FROM alpine\nRUN ", "--device=v/c=# \\\n", "x", bytes),
        ),
        (
            "many volumes",
            numbered("FROM alpine\nVOLUME ", "/v# \\\n", "", bytes),
        ),
        (
            "many arguments",
            numbered("FROM alpine\nARG ", "a#=$a#b \\\n", "", bytes),
        ),
        (
            "many labels",
            numbered("FROM alpine\nLABEL ", "a#=$a# \\\n", "", bytes),
        ),
        (
            "many urls",
            numbered("FROM alpine\nADD ", "http://e.com/# \\\n", "/", bytes),
        ),
    ]
}

/// One instruction of many words with numbers in them.
fn numbered(start: &str, word: &str, end: &str, bytes: usize) -> String {
    repeat(start, |at| word.replace('#', &at.to_string()), bytes) + end + "\n"
}

/// One instruction with many documents, all of them there.
fn documents(instruction: &str, end: &str, bytes: usize) -> String {
    let count = bytes / 24;
    let announced: String = (0..count).map(|at| format!("<<d{at} \\\n")).collect();
    let read: String = (0..count).map(|at| format!("{at}\nd{at}\n")).collect();
    format!("FROM alpine\n{instruction} {announced}{end}\n{read}")
}

/// Makes the next piece of a text; it is handed a source of numbers below a bound.
type Piece<'a> = dyn FnMut(&mut dyn FnMut(usize) -> usize) -> String + 'a;

/// Text without a meaning as a whole: noise, and pieces of what has one. The same each time.
fn noise(bytes: usize) -> Vec<(&'static str, String)> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
    };
    let mut fill = |start: &str, piece: &mut Piece<'_>| {
        let mut text = start.to_owned();
        while text.len() < bytes {
            text.push_str(&piece(&mut next));
        }
        text
    };
    let corpus = corpus();
    let lines: Vec<&str> = corpus.iter().flat_map(|text| text.lines()).collect();
    vec![
        (
            "any characters",
            fill("", &mut |next| {
                char::from_u32(u32::try_from(next(0x3000)).unwrap())
                    .into_iter()
                    .collect()
            }),
        ),
        (
            "printable characters",
            fill("FROM alpine\n", &mut |next| {
                char::from(u8::try_from(usize::from(b' ') + next(95)).unwrap()).to_string()
            }),
        ),
        (
            "pieces",
            fill("FROM alpine\n", &mut |next| PIECES[next(PIECES.len())].to_owned()),
        ),
        (
            "pieces of words",
            fill("FROM alpine\nENV A=", &mut |next| {
                [
                    "${A", ":-", "}", "\"", "'", "/", "//", "#", "%%", "*", "a", "\\", "\\\n",
                ][next(13)]
                .to_owned()
            }),
        ),
        (
            "lines",
            fill("FROM alpine\n", &mut |next| {
                format!("{}\n", lines[next(lines.len())])
            }),
        ),
        (
            "whole files",
            fill("", &mut |next| format!("{}\n", corpus[next(corpus.len())])),
        ),
    ]
}

/// How long the thread has run so far. The load of the machine does not count.
pub fn time_run() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// A megabyte of anything is converted or refused within a second. Without optimisation less of it has more time.
#[test]
fn monsters_are_survived() {
    let bytes = std::env::var("HOSTILE_BYTES")
        .ok()
        .and_then(|text| text.parse().ok());
    let only = std::env::var("HOSTILE").ok();
    let (size, limit_s) = if cfg!(debug_assertions) {
        (32 << 10, 10)
    } else {
        (1 << 20, 1)
    };
    let size = bytes.unwrap_or(size);
    let monsters = many_lines(size)
        .into_iter()
        .chain(growing(size))
        .chain(long_lines(size))
        .chain(long_lists(size))
        .chain(noise(size));
    let mut slow = Vec::new();
    for (name, dockerfile) in monsters {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let lint = BTreeMap::from([("requestid".to_owned(), "frontend.lint".to_owned())]);
        for (asked, options) in [("", BTreeMap::new()), (" (lint)", lint)] {
            let started = time_run();
            let result = convert(&dockerfile, options);
            let took = time_run() - started;
            if bytes.is_some() {
                let shown = result
                    .map(|_| "converted".to_owned())
                    .unwrap_or_else(|failure| failure.message.chars().take(90).collect());
                eprintln!("{:>6} ms  {name}{asked}: {shown}", took.as_millis());
            } else if took > Duration::from_secs(limit_s) {
                slow.push(format!("{name}{asked}: {took:?}"));
            }
        }
    }
    assert!(slow.is_empty(), "{slow:#?}");
}

/// Each finding shows its instruction, here thousands of lines.
#[test]
fn a_report_of_findings_has_bounds() {
    let dockerfile = numbered("FROM alpine\nARG ", "a#=$a#b \\\n", "", 64 << 10);
    let lint = BTreeMap::from([("requestid".to_owned(), "frontend.lint".to_owned())]);
    let failure = convert(&dockerfile, lint).unwrap_err();
    assert!(
        failure
            .message
            .contains("the report of what was found is too large")
    );
}

#[test]
fn a_large_dockerfile_is_quick() {
    let dockerfile = repeat(
        "",
        |at| {
            let run = "RUN echo $A \\\n  && true\n".repeat(9);
            format!("FROM alpine AS stage{at}\nENV A={at}\n{run}")
        },
        22_000,
    );
    let started = Instant::now();
    assert!(convert(&dockerfile, BTreeMap::new()).is_ok());
    if std::env::var("HOSTILE_BYTES").is_ok() {
        eprintln!("{} lines: {:?}", dockerfile.lines().count(), started.elapsed());
    }
}

/// All Dockerfiles of the golden cases.
pub fn corpus() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path: &std::path::PathBuf| std::fs::read_to_string(path.join("Dockerfile")).ok();
    paths.iter().filter_map(read).collect()
}

/// Fragments that mean something somewhere.
const PIECES: [&str; 24] = [
    "\\\n",
    "\n",
    "${",
    "}",
    "$",
    "'",
    "\"",
    "<<E",
    "\nE\n",
    "--",
    "=",
    ",",
    "[\"",
    "\"]",
    "# check=error=true\n",
    " AS ",
    "FROM ",
    "ONBUILD ",
    "--mount=type=",
    "--from=",
    ":-",
    "//",
    "\u{feff}",
    "é\u{800}",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Dockerfiles with pieces cut out and others put in never panic.
    #[test]
    fn mutations_are_survived(
        pick in any::<proptest::sample::Index>(),
        edits in prop::collection::vec((any::<proptest::sample::Index>(), 0usize..9, 0usize..PIECES.len(), any::<bool>()), 0..6),
        lint in any::<bool>(),
    ) {
        let corpus = corpus();
        let mut text: Vec<char> = pick.get(&corpus).chars().collect();
        for (at, cut, piece, puts) in edits {
            let from = at.index(text.len() + 1);
            let to = (from + cut).min(text.len());
            let piece = if puts { PIECES[piece] } else { "" };
            text.splice(from..to, piece.chars());
        }
        let text: String = text.into_iter().collect();
        let mut options = BTreeMap::new();
        if lint {
            options.insert("requestid".to_owned(), "frontend.lint".to_owned());
        }
        let _ = convert(&text, options);
    }

    /// Arbitrary text never panics either.
    #[test]
    fn noise_is_survived(lines in prop::collection::vec("(FROM alpine|RUN|COPY|ADD|ENV|ARG|HEALTHCHECK|EXPOSE|VOLUME|LABEL|ONBUILD COPY)?[ -~\t\\\\$\"'{}<é]{0,30}", 0..8)) {
        let _ = convert(&format!("FROM alpine\n{}", lines.join("\n")), BTreeMap::new());
    }
}
