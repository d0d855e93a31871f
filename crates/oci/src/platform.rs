//! Platforms and their text form `os[(version+feature)]/architecture[/variant]`.
//!
//! The rules are those of containerd's platform library, which every client of the ecosystem applies.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::json::nullable;
use crate::path;

/// The operating system and CPU an image is for.
///
/// Ordered field by field, so that it may serve as a key; see [`crate::PlatformMatcher`] for preference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture in Go's spelling, such as `amd64`.
    #[serde(default, deserialize_with = "nullable")]
    pub architecture: String,
    /// Operating system in Go's spelling, such as `linux`.
    #[serde(default, deserialize_with = "nullable")]
    pub os: String,
    /// Version of the operating system.
    #[serde(
        default,
        rename = "os.version",
        deserialize_with = "nullable",
        skip_serializing_if = "String::is_empty"
    )]
    pub os_version: String,
    /// Features the operating system must have.
    #[serde(
        default,
        rename = "os.features",
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
    /// Variant of the CPU, such as `v7`.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "String::is_empty"
    )]
    pub variant: String,
}

/// Why a text is not a platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// Wildcards have no meaning.
    #[error("{0:?}: wildcards not yet supported: invalid argument")]
    Wildcard(String),
    /// The first part is not an operating system with optional version and features.
    #[error(
        "{part:?} is an invalid OS component of {text:?}: OSAndVersion specifier component must match {OS_FORM:?}: invalid argument"
    )]
    Os {
        /// The part.
        part: String,
        /// The whole text.
        text: String,
    },
    /// The version or a feature has a broken percent escape, or a feature is empty.
    #[error("{text:?} has an invalid OS version or feature {part:?}: invalid argument")]
    OsOption {
        /// The part.
        part: String,
        /// The whole text.
        text: String,
    },
    /// A later part has characters that cannot occur.
    #[error(
        "{part:?} is an invalid component of {text:?}: platform specifier component must match {PART_FORM:?}: invalid argument"
    )]
    Part {
        /// The part.
        part: String,
        /// The whole text.
        text: String,
    },
    /// A lone word is neither a known operating system nor a known architecture.
    #[error("{0:?}: unknown operating system or architecture: invalid argument")]
    Unknown(String),
    /// There are more than three parts.
    #[error("{0:?}: cannot parse platform specifier: invalid argument")]
    TooManyParts(String),
}

const PART_FORM: &str = "^[A-Za-z0-9_.-]+$";
const OS_FORM: &str = r"^([A-Za-z0-9_-]+)(?:\(([A-Za-z0-9_.%-]*)((?:\+[A-Za-z0-9_.%-]+)*)\))?$";

/// Operating systems a lone word may name (Go's list).
const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
    "zos",
];

/// Architectures a lone word may name (Go's list).
const KNOWN_ARCH: &[&str] = &[
    "386",
    "amd64",
    "amd64p32",
    "arm",
    "armbe",
    "arm64",
    "arm64be",
    "ppc64",
    "ppc64le",
    "loong64",
    "mips",
    "mipsle",
    "mips64",
    "mips64le",
    "mips64p32",
    "mips64p32le",
    "ppc",
    "riscv",
    "riscv64",
    "s390",
    "s390x",
    "sparc",
    "sparc64",
    "wasm",
];

impl Platform {
    /// Makes a platform of an operating system and an architecture, as given.
    pub fn new(os: impl Into<String>, architecture: impl Into<String>) -> Self {
        Self {
            os: os.into(),
            architecture: architecture.into(),
            ..Self::default()
        }
    }

    /// Returns the platform this program was built for, normalized; on 32-bit ARM the variant is v7.
    pub fn host() -> Self {
        Self::new("linux", host_architecture()).normalized()
    }

    /// Parses a specifier such as `linux/arm/v7`, `arm64` or `windows(10.0.17763)/amd64`.
    pub fn parse(text: &str) -> Result<Self, PlatformError> {
        if text.contains('*') {
            return Err(PlatformError::Wildcard(text.into()));
        }
        let parts: Vec<&str> = text.splitn(4, '/').collect();
        let mut platform = parse_os(parts[0], text)?;
        for part in &parts[1..] {
            if part.is_empty()
                || !part
                    .bytes()
                    .all(|c| c.is_ascii_alphanumeric() || b"_.-".contains(&c))
            {
                return Err(PlatformError::Part {
                    part: (*part).into(),
                    text: text.into(),
                });
            }
        }
        match parts[..] {
            [_] if KNOWN_OS.contains(&platform.os.as_str()) => {
                platform.architecture = host_architecture().into();
                Ok(platform)
            }
            [word] => {
                (platform.architecture, platform.variant) = normalize_arch(word, "");
                platform.drop_arm_v7();
                if !KNOWN_ARCH.contains(&platform.architecture.as_str()) {
                    return Err(PlatformError::Unknown(text.into()));
                }
                platform.os = "linux".into();
                Ok(platform)
            }
            [_, architecture] => {
                (platform.architecture, platform.variant) = normalize_arch(architecture, "");
                platform.drop_arm_v7();
                Ok(platform)
            }
            [_, architecture, variant] => {
                (platform.architecture, platform.variant) = normalize_arch(architecture, variant);
                if platform.architecture == "arm64" && platform.variant.is_empty() {
                    platform.variant = "v8".into();
                }
                Ok(platform)
            }
            _ => Err(PlatformError::TooManyParts(text.into())),
        }
    }

    fn drop_arm_v7(&mut self) {
        if self.architecture == "arm" && self.variant == "v7" {
            self.variant.clear();
        }
    }

    /// Returns the platform in canonical spelling: `x86_64` is `amd64`, `arm64/v8` loses its variant, `arm` gains `v7`,
    /// an empty operating system is `linux`, features are sorted and unique.
    #[must_use]
    pub fn normalized(&self) -> Self {
        let (architecture, variant) = normalize_arch(&self.architecture, &self.variant);
        let mut os_features = self.os_features.clone();
        os_features.sort();
        os_features.dedup();
        Self {
            os: normalize_os(&self.os),
            architecture,
            variant,
            os_version: self.os_version.clone(),
            os_features,
        }
    }

    /// Formats `os/architecture[/variant]`; `unknown` without an operating system.
    pub fn format(&self) -> String {
        self.format_with_os(&self.os)
    }

    /// Formats with version and features of the operating system in parentheses.
    pub fn format_all(&self) -> String {
        let mut features: Vec<&str> = self
            .os_features
            .iter()
            .map(String::as_str)
            .filter(|feature| !feature.is_empty())
            .collect();
        features.sort_unstable();
        features.dedup();
        if self.os_version.is_empty() && features.is_empty() {
            return self.format();
        }
        let mut os = format!("{}({}", self.os, encode_os_option(&self.os_version));
        for feature in features {
            os.push('+');
            os.push_str(&encode_os_option(feature));
        }
        os.push(')');
        self.format_with_os(&os)
    }

    fn format_with_os(&self, os: &str) -> String {
        if self.os.is_empty() {
            return "unknown".into();
        }
        path::join(&[os, &self.architecture, &self.variant])
    }
}

/// Formats as [`Platform::format_all`] does.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.format_all())
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        Self::parse(text)
    }
}

fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    }
}

fn parse_os(part: &str, text: &str) -> Result<Platform, PlatformError> {
    let bad = || PlatformError::Os {
        part: part.into(),
        text: text.into(),
    };
    let (name, options) = match part.split_once('(') {
        None => (part, ""),
        Some((name, options)) => (name, options.strip_suffix(')').ok_or_else(bad)?),
    };
    let is_option = |c: u8| c.is_ascii_alphanumeric() || b"_.%-".contains(&c);
    let mut words = options.split('+');
    let version = words.next().unwrap_or_default();
    let features: Vec<&str> = words.collect();
    if name.is_empty()
        || !name
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || b"_-".contains(&c))
        || !version.bytes().all(is_option)
        || !features
            .iter()
            .all(|feature| !feature.is_empty() && feature.bytes().all(is_option))
    {
        return Err(bad());
    }
    let decode = |word: &str| {
        decode_os_option(word).ok_or_else(|| PlatformError::OsOption {
            part: word.into(),
            text: text.into(),
        })
    };
    let os_features = features.into_iter().map(decode).collect::<Result<Vec<_>, _>>()?;
    Ok(Platform {
        os: normalize_os(name),
        os_version: decode(version)?,
        os_features,
        ..Platform::default()
    })
}

fn encode_os_option(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '%' => out.push_str("%25"),
            '+' => out.push_str("%2B"),
            '(' => out.push_str("%28"),
            ')' => out.push_str("%29"),
            '/' => out.push_str("%2F"),
            c => out.push(c),
        }
    }
    out
}

fn decode_os_option(value: &str) -> Option<String> {
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.bytes();
    while let Some(c) = bytes.next() {
        if c == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(c);
        }
    }
    String::from_utf8(out).ok()
}

fn normalize_os(os: &str) -> String {
    match os.to_lowercase().as_str() {
        "" => "linux".into(),
        "macos" => "darwin".into(),
        other => other.into(),
    }
}

fn normalize_arch(architecture: &str, variant: &str) -> (String, String) {
    let architecture = architecture.to_lowercase();
    let variant = variant.to_lowercase();
    let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
        ("i386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "9.0" | "v9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", variant) => ("arm64", variant),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        (architecture, variant) => (architecture, variant),
    };
    (architecture.to_owned(), variant.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, String, String) {
        let p = Platform::parse(text).unwrap();
        (p.os, p.architecture, p.variant)
    }

    #[test]
    fn parse_normalizes_the_spellings_people_use() {
        for (text, os, arch, variant) in [
            ("linux/x86_64", "linux", "amd64", ""),
            ("Linux/x86-64", "linux", "amd64", ""),
            ("linux/amd64/v1", "linux", "amd64", ""),
            ("linux/amd64/v2", "linux", "amd64", "v2"),
            ("linux/arm", "linux", "arm", ""),
            ("linux/arm/v7", "linux", "arm", "v7"),
            ("linux/arm/6", "linux", "arm", "v6"),
            ("linux/armhf", "linux", "arm", ""),
            ("linux/armel", "linux", "arm", "v6"),
            ("linux/aarch64", "linux", "arm64", ""),
            ("linux/arm64/v8", "linux", "arm64", "v8"),
            ("linux/arm64/v9.0", "linux", "arm64", "v9"),
            ("arm64", "linux", "arm64", ""),
            ("armel", "linux", "arm", "v6"),
            ("i386", "linux", "386", ""),
            ("macos/arm64", "darwin", "arm64", ""),
            ("windows/amd64", "windows", "amd64", ""),
            ("foo/bar", "foo", "bar", ""),
        ] {
            assert_eq!(parsed(text), (os.into(), arch.into(), variant.into()), "{text}");
        }
    }

    #[test]
    fn parse_reads_os_version_and_features() {
        let p = Platform::parse("windows(10.0.17763+win32k+a%2Bb)/amd64").unwrap();
        assert_eq!(
            (p.os_version.as_str(), p.os_features.clone()),
            ("10.0.17763", vec!["win32k".into(), "a+b".into()])
        );
        assert_eq!(p.format(), "windows/amd64");
        assert_eq!(p.format_all(), "windows(10.0.17763+a%2Bb+win32k)/amd64");
        assert_eq!(
            Platform::parse(&p.format_all()).unwrap().normalized(),
            p.normalized()
        );
    }

    #[test]
    fn parse_refuses_with_the_texts_people_know() {
        for (text, want) in [
            (
                "linux/*",
                "\"linux/*\": wildcards not yet supported: invalid argument",
            ),
            (
                "foo",
                "\"foo\": unknown operating system or architecture: invalid argument",
            ),
            (
                "a/b/c/d",
                "\"a/b/c/d\": cannot parse platform specifier: invalid argument",
            ),
            (
                "linux/&",
                "\"&\" is an invalid component of \"linux/&\": platform specifier component must match \"^[A-Za-z0-9_.-]+$\": invalid argument",
            ),
        ] {
            assert_eq!(Platform::parse(text).unwrap_err().to_string(), want);
        }
        for text in [
            "",
            "/",
            "linux/",
            "linux(",
            "linux()x/amd64",
            "linux(1+)/amd64",
            "linux(%zz)/amd64",
        ] {
            assert!(Platform::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn json_order_is_gos() {
        let p = Platform {
            variant: "v7".into(),
            ..Platform::new("linux", "arm")
        };
        assert_eq!(
            serde_json::to_string(&p).unwrap(),
            r#"{"architecture":"arm","os":"linux","variant":"v7"}"#
        );
    }
}
