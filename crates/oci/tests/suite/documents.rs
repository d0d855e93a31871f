//! JSON documents: Go's bytes, null where Go writes it, fields nobody knows.

use oci::{Descriptor, Digest, ImageConfig, Index, Manifest, Platform, PlatformMatcher, json, media_type};
use proptest::prelude::*;

#[test]
fn manifests_have_gos_bytes() {
    let config = Descriptor::of_bytes(media_type::OCI_CONFIG, b"{}");
    let layer = Descriptor::of_bytes(media_type::OCI_LAYER_GZIP, b"x")
        .with_annotation("b", "<&>")
        .with_annotation("a", "1");
    let text = json::to_string(&Manifest::new(config, vec![layer])).unwrap();
    let (config, layer) = (Digest::sha256("{}"), Digest::sha256("x"));
    let want = format!(
        concat!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":"#,
            r#"{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":2}},"layers":"#,
            r#"[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}","size":1,"#,
            r#""annotations":{{"a":"1","b":"\u003c\u0026\u003e"}}}}]}}"#,
        ),
        config, layer
    );
    assert_eq!(text, want);
    let indented = json::to_vec_indent(&Index::new(Vec::new()), "  ").unwrap();
    let want = "{\n  \"schemaVersion\": 2,\n  \"mediaType\": \"application/vnd.oci.image.index.v1+json\",\n  \"manifests\": []\n}";
    assert_eq!(String::from_utf8(indented).unwrap(), want);
}

#[test]
fn configurations_keep_what_nobody_knows() {
    let text = concat!(
        r#"{"created":"2024-01-01T00:00:00Z","architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":null},"#,
        r#""history":[{"created_by":"RUN","empty_layer":true}],"config":{"Env":["A=b"],"Cmd":null,"Labels":null,"#,
        r#""Healthcheck":{"Test":["CMD","x"],"Interval":5},"ExposedPorts":{"80/tcp":{}},"OnBuild":["RUN y"],"Shell":["sh"],"#,
        r#""Hostname":"h"},"docker_version":"20.10","container":"c"}"#,
    );
    let config: ImageConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.extra["docker_version"], "20.10");
    assert_eq!(config.config.extra["Hostname"], "h");
    let want = concat!(
        r#"{"created":"2024-01-01T00:00:00Z","architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"#,
        r#""history":[{"created_by":"RUN","empty_layer":true}],"config":{"ExposedPorts":{"80/tcp":{}},"Env":["A=b"],"#,
        r#""Healthcheck":{"Test":["CMD","x"],"Interval":5},"OnBuild":["RUN y"],"Shell":["sh"],"Hostname":"h"},"#,
        r#""container":"c","docker_version":"20.10"}"#,
    );
    assert_eq!(json::to_string(&config).unwrap(), want);
    let want = r#"{"architecture":"","os":"","rootfs":{"type":"layers","diff_ids":[]},"config":{}}"#;
    assert_eq!(json::to_string(&ImageConfig::default()).unwrap(), want);
}

#[test]
fn nulls_and_gaps_are_defaults() {
    let manifest: Manifest = serde_json::from_str(&format!(
        r#"{{"schemaVersion":2,"mediaType":null,"config":{{"digest":"{}","size":0}},"layers":null}}"#,
        Digest::sha256("")
    ))
    .unwrap();
    assert!(manifest.layers.is_empty() && manifest.media_type.is_empty());
    assert!(serde_json::from_str::<Descriptor>(r#"{"digest":"sha256:0","size":1}"#).is_err());
    assert!(
        serde_json::from_str::<Descriptor>(&format!(r#"{{"digest":"{}","size":-1}}"#, Digest::sha256("")))
            .is_err()
    );
}

proptest! {
    #[test]
    fn strings_are_escaped_as_in_go(text: String) {
        let escaped = json::to_string(&text).unwrap();
        let raw = escaped.contains(['<', '>', '&', '\u{2028}', '\u{2029}']);
        prop_assert!(!raw);
        prop_assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), text);
    }

    #[test]
    fn platforms_survive_text(
        os in "(linux|windows|plan9)", arch in "(amd64|arm|arm64|386|riscv64|x86_64|aarch64|foo)", variant in "(v[5-9]|v8\\.1)?",
        version in "[0-9.%+()/]{0,6}", features in prop::collection::vec("[a-z+%/]{1,3}", 0..3),
    ) {
        let platform = Platform { variant, os_version: version, os_features: features, ..Platform::new(os, arch) }.normalized();
        let again = Platform::parse(&platform.format_all()).unwrap().normalized();
        prop_assert_eq!(&again, &platform);
        prop_assert_eq!(platform.normalized(), platform.clone());
        let known = platform.architecture != "arm64" || matches!(platform.variant.as_str(), "" | "v8" | "v8.1" | "v9");
        prop_assert!(!known || platform.os == "windows" || PlatformMatcher::only(&platform).matches(&platform));
        prop_assert!(platform.os == "windows" || PlatformMatcher::strict(&platform).matches(&platform));
    }

    #[test]
    fn any_platform_is_read_or_refused(text: String) {
        let _ = Platform::parse(&text);
    }
}
