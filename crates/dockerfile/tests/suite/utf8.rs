//! Dockerfiles that are not UTF-8: bytes live on where they do for BuildKit, and are refused where it refuses them.

use std::collections::BTreeMap;

use dockerfile::{BuildOutcome, Failure, Outcome};

use crate::hostile::convert_bytes;

fn build(dockerfile: &[u8]) -> Result<BuildOutcome, Box<Failure>> {
    match convert_bytes(dockerfile, BTreeMap::new())? {
        Outcome::Build(build) => Ok(build),
        other => panic!("{other:?}"),
    }
}

/// The digests are those of BuildKit's vertices.
#[test]
fn digests_are_buildkits() {
    let cases: [(&[u8], &[&str]); 7] = [
        (
            b"COPY <<\"E\" /x\na\xffb\nE\n",
            &[
                "1121f6093cfe92c7b0d3ce17b30061617f1ea25caf350117b77da9b06900ede3",
                "e4b6d288f0e6d909021b4c63502d2229b5370517fbbe142c5da99a0796daffc2",
            ],
        ),
        (
            b"COPY <<E /x\na\xffb\nE\n",
            &[
                "0ad09e1bc1a67b5ee4a6580a61813f6c40c0f905a38782017af88dbd1e8c2647",
                "2662c831e69a8e4e944a956d88ddf415530dce85a177ffa9f61beb35479245f6",
            ],
        ),
        (
            b"RUN --mount=type=cache,id=a\xff,target=/c\xe2\x82 x\n",
            &["5022f551c0b4a441101dec881f61d0b23ac8752ad580b0b7e155079813ae8bc8"],
        ),
        (
            b"RUN [\"x\", \"\xe2\x82\"]\n",
            &["a2bfb01c7ea2a5740e7ca115ed6dad58f689c3a70039b535a060e12c2e61f818"],
        ),
        (
            b"ENV A=\xff\nUSER \xff\nWORKDIR /\xff\nRUN x\n",
            &[
                "1de156c228bc61c21cb7f58a6d2acd1a4cba133316e278e662d6a75caa23aa0b",
                "b5910907d61a2fe07e18f480ca1666195641e6e8238b5f5cf3e521b5e4d2fb90",
            ],
        ),
        (
            b"RUN <<E\n#!/bin/x\n\xff\nE\n",
            &[
                "58ffde687e5c4eda078cd80f32fd13209a908a84d56fdc299fe4cb84ad8118ab",
                "f3128ba0e1c328cf486c90d27fc45e5761df23ad8f372fc868ec0d31e81599fc",
            ],
        ),
        // The byte is a space of Latin-1.
        (
            b"RUN --mount=type=cache,target=/c\xa0 x\n",
            &["693a95d2dea5e96e1acc8926c07ddfb0ee99c9516dbb54436652faea99f190eb"],
        ),
    ];
    for (instructions, digests) in cases {
        let dockerfile = [b"FROM scratch\n", instructions].concat();
        let definition = &build(&dockerfile).unwrap().results[0].definition;
        let graph = llb::Graph::load(definition).unwrap();
        let mut found: Vec<String> = graph
            .vertices()
            .iter()
            .map(|vertex| vertex.digest.hex())
            .collect();
        found.sort();
        assert_eq!(found, digests, "{}", instructions.escape_ascii());
    }
}

#[test]
fn commands_are_refused_with_their_place() {
    let cases: [(&[u8], u32, u32); 6] = [
        (b"FROM scratch\nRUN echo \xff\n", 2, 2),
        (b"FROM scratch\nRUN echo $A\xe2\x82\n", 2, 2),
        (b"FROM scratch\nUSER u\nRUN <<E\necho a\necho \xff\nE\n", 3, 5),
        (b"FROM scratch\nRUN a \\\n  # \xff\n  && b \\\n  \xff\n", 2, 3),
        (b"FROM scratch AS a\nONBUILD RUN \xff\nFROM a\n", 3, 3),
        // The second half of a character behind a flag that ends within it.
        (
            "FROM scratch\nRUN --mount=type=cache,target=/c\u{800}x\n".as_bytes(),
            2,
            2,
        ),
    ];
    for (dockerfile, first, line) in cases {
        let failure = match build(dockerfile) {
            Err(failure) => failure,
            Ok(_) => panic!("{} is built", dockerfile.escape_ascii()),
        };
        assert_eq!(
            failure.message,
            format!(
                "failed to marshal LLB definition: string field contains invalid UTF-8: Dockerfile line {line} holds \
                 bytes that are not UTF-8, save the file as UTF-8"
            ),
            "{}",
            dockerfile.escape_ascii()
        );
        assert_eq!(failure.sources[0].ranges[0].start.line, first);
    }
}

#[test]
fn what_is_not_part_of_a_command_is_none_of_its_business() {
    for dockerfile in [
        b"FROM scratch\n# \xff\nRUN true \\\n  # \xff\n  && true\n".as_slice(),
        b"FROM scratch AS unused\nRUN \xff\nFROM scratch\nRUN true\n",
        b"FROM scratch\nCMD \xff\nMAINTAINER \xff\nCOPY \xff /\xff\n",
        b"# check=skip=\xff\nFROM scratch\n",
    ] {
        assert!(build(dockerfile).is_ok(), "{}", dockerfile.escape_ascii());
    }
}

/// Escapes and replacements are those that BuildKit's configuration has.
#[test]
fn the_image_says_what_buildkits_says() {
    let dockerfile = b"FROM scratch\nMAINTAINER m\xff\nLABEL a\xff=\xff\nLABEL k\xff v\xff\nENV z \xff\nENV y=\xff\n\
        HEALTHCHECK CMD h\xff\nCMD c\xff\nENTRYPOINT [\"e\xff\"]\nONBUILD RUN \xff\nVOLUME /\xff\nVOLUME [\"/j\xff\"]\n\
        USER u\xff\nWORKDIR /w\xff\nSHELL [\"s\xff\"]\n";
    let config = String::from_utf8(build(dockerfile).unwrap().results[0].config.clone()).unwrap();
    let wanted = concat!(
        "\"config\":{\"User\":\"u\u{fffd}\",\"Env\":[\"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\",",
        "\"z=\u{fffd}\",\"y=\u{fffd}\"],\"Entrypoint\":[\"e\u{fffd}\"],\"Cmd\":[\"/bin/sh\",\"-c\",\"c\\ufffd\"],",
        "\"Volumes\":{\"/j\u{fffd}\":{},\"/\u{fffd}\":{}},\"WorkingDir\":\"/w\u{fffd}\",",
        "\"Labels\":{\"a\u{fffd}\":\"\u{fffd}\",\"k\u{fffd}\":\"v\u{fffd}\"},\"ArgsEscaped\":true,",
        "\"Healthcheck\":{\"Test\":[\"CMD-SHELL\",\"h\\ufffd\"]},\"OnBuild\":[\"RUN \\ufffd\"],\"Shell\":[\"s\u{fffd}\"]}"
    );
    assert!(config.contains(wanted), "{config}\n{wanted}");
    let cmd = "\"created_by\":\"CMD [\\\"/bin/sh\\\" \\\"-c\\\" \\\"c\\\\xff\\\"]\"";
    assert!(config.contains(cmd), "{config}");
}

#[test]
fn errors_show_it() {
    for (dockerfile, message) in [
        (
            b"FROM scratch AS x\xff\n".as_slice(),
            "dockerfile parse error on line 1: invalid name for build stage: \"x\\xff\", name can't start with a number \
             or contain symbols",
        ),
        (
            b"FROM scratch\nCOPY --from=\xff a b\n",
            "failed to parse stage name \"\u{ff}\": invalid reference format",
        ),
        (b"FROM scratch\nSTOPSIGNAL \xff\n", "invalid signal: \u{fffd}"),
        (
            b"\xff\xfeF\0R\0O\0M\0 \0x\0\n\0",
            "dockerfile parse error on line 1: unknown instruction: \u{fffd}\u{fffd}F\0R\0O\0M\0",
        ),
        (
            b"\xfe\xff\0F\0R\0O\0M\0 \0x\0\n",
            "dockerfile parse error on line 1: unknown instruction: \u{fffd}\u{fffd}\0F\0R\0O\0M\0",
        ),
    ] {
        assert_eq!(build(dockerfile).unwrap_err().message, message);
    }
}
