//! Mutated Dockerfiles, made of a seed: nothing panics, nothing takes long.
//!
//! `cargo xtask fuzz SECONDS` runs it for longer, each time with another seed; a failure names the seed that repeats it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::hostile::{convert_bytes, corpus, time_run};

/// What is asked of the frontend besides a build.
const ASKED: [(&str, &str); 10] = [
    ("", ""),
    ("", ""),
    ("requestid", "frontend.lint"),
    ("requestid", "frontend.outline"),
    ("requestid", "frontend.targets"),
    ("requestid", "frontend.convertllb"),
    ("platform", "windows/amd64"),
    ("platform", "linux/amd64,linux/arm/v7"),
    ("build-arg:SOURCE_DATE_EPOCH", "a"),
    ("no-cache", ""),
];

/// Bytes that mean something somewhere.
const PIECES: [&[u8]; 40] = [
    b"\\\n",
    b"\n",
    b"\r\n",
    b"${",
    b"}",
    b"$",
    b"'",
    b"\"",
    b"<<E",
    b"<<-'E'",
    b"\nE\n",
    b"--",
    b"=",
    b",",
    b"[\"",
    b"\"]",
    b"# check=error=true\n",
    b"# syntax=a\n",
    b"# escape=`\n",
    b" AS ",
    b"FROM ",
    b"FROM alpine\n",
    b"RUN ",
    b"COPY --from=",
    b"ADD http://a/b /\n",
    b"ARG ",
    b"ENV a=${a}${a}b\n",
    b"ONBUILD ",
    b"HEALTHCHECK --interval=",
    b"--mount=type=",
    b"--from=",
    b":-",
    b"//",
    b"##",
    b"%%",
    b"*",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xe2\x82",
    b"\xa0",
];

/// Numbers of a seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % bound.max(1)
    }
}

/// Makes a Dockerfile of others: spliced, cut, repeated, with pieces put in.
fn mutate(corpus: &[String], numbers: &mut Numbers) -> Vec<u8> {
    let mut text = corpus[numbers.below(corpus.len())].clone().into_bytes();
    for _ in 0..=numbers.below(8) {
        let from = numbers.below(text.len() + 1);
        let to = (from + numbers.below(20)).min(text.len());
        match numbers.below(6) {
            0 => drop(text.drain(from..to)),
            1 => {
                let other = corpus[numbers.below(corpus.len())].as_bytes();
                let at = numbers.below(other.len() + 1);
                text.splice(from..from, other[at..].iter().copied());
            }
            2 => {
                let part = text[from..to].repeat(1 + numbers.below(200));
                text.splice(from..from, part);
            }
            3 if from < text.len() => text[from] = numbers.below(256).to_le_bytes()[0],
            _ => {
                let piece = PIECES[numbers.below(PIECES.len())];
                text.splice(from..from, piece.iter().copied());
            }
        }
    }
    text
}

#[test]
fn mutants_are_survived() {
    let seconds = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let duration = Duration::from_secs(seconds("FUZZ_SECONDS").unwrap_or(2));
    let seed = seconds("FUZZ_SEED").unwrap_or(0x9e37_79b9);
    let limit = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 1 });
    let corpus = corpus();
    let started = Instant::now();
    let mut count = 0_u64;
    // At least some, however slow the machine is.
    while started.elapsed() < duration || count < 100 {
        let mut numbers = Numbers((seed + count).wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
        let text = mutate(&corpus, &mut numbers);
        let (name, value) = ASKED[numbers.below(ASKED.len())];
        let options = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let before = time_run();
        let survived = catch_unwind(AssertUnwindSafe(|| convert_bytes(&text, options))).is_ok();
        let took = time_run() - before;
        assert!(
            survived && took < limit,
            "FUZZ_SEED={} with {name}={value}: panics or takes {took:?}: {}",
            seed + count,
            text.escape_ascii()
        );
        count += 1;
    }
    if seconds("FUZZ_SECONDS").is_some() {
        eprintln!("{count} Dockerfiles from seed {seed}");
    }
}
