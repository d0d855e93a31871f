//! `RUN --device`, which only the labs versions of the frontend know.

use std::collections::BTreeMap;

use crate::hostile::convert;

#[test]
fn devices_are_for_the_labs_versions() {
    for flag in ["v/c=d", "v/c=d,required", "name=v/c,required=false"] {
        let text = format!("FROM alpine\nRUN --device={flag} x\n");
        let failure = convert(&text, BTreeMap::new()).unwrap_err();
        assert_eq!(
            failure.message,
            "device feature is only supported in Dockerfile frontend 1.14.0-labs or later"
        );
        assert_eq!(failure.sources[0].ranges[0].start.line, 2);
    }
    // A stage that nobody asks for may have them.
    let unused = "FROM alpine AS a\nRUN --device=v/c x\nFROM alpine\nRUN x\n";
    assert!(convert(unused, BTreeMap::new()).is_ok());
}

#[test]
fn unknown_options_are_refused() {
    for flag in [
        "v/c,nonsense",
        "v/c,requird=true",
        "name=a,name=b",
        "v/c,required=maybe",
    ] {
        let text = format!("FROM alpine\nRUN --device={flag} x\n");
        let failure = convert(&text, BTreeMap::new()).unwrap_err();
        assert!(!failure.message.contains("labs"), "{flag}: {}", failure.message);
    }
}
