//! Choosing among platforms: which images a platform can run, and which it runs best.

use std::cmp::Ordering;

use crate::Platform;

/// Matches platforms against an ordered list of acceptable ones, most preferred first.
#[derive(Clone, Debug)]
pub struct PlatformMatcher {
    /// Normalized.
    accepted: Vec<Platform>,
}

impl PlatformMatcher {
    /// Accepts what `platform` can run: lower variants of it, `386` on `amd64`, `arm` on `arm64`.
    pub fn only(platform: &Platform) -> Self {
        Self {
            accepted: compatible(&platform.normalized())
                .iter()
                .map(Platform::normalized)
                .collect(),
        }
    }

    /// Accepts `platform` alone, in any spelling.
    pub fn strict(platform: &Platform) -> Self {
        Self {
            accepted: vec![platform.normalized()],
        }
    }

    /// Accepts any of `platforms`, each alone, in order of preference.
    pub fn ordered<'a>(platforms: impl IntoIterator<Item = &'a Platform>) -> Self {
        Self {
            accepted: platforms.into_iter().map(Platform::normalized).collect(),
        }
    }

    /// Tells whether `platform` is accepted.
    pub fn matches(&self, platform: &Platform) -> bool {
        self.rank(platform).is_some()
    }

    /// Returns the position of the first accepted platform that matches; less is better.
    pub fn rank(&self, platform: &Platform) -> Option<usize> {
        self.accepted
            .iter()
            .position(|accepted| matches(accepted, platform))
    }

    /// Orders by preference: `Less` is better. A stable sort by this and taking the first is the choice of containerd.
    pub fn compare(&self, a: &Platform, b: &Platform) -> Ordering {
        let by_rank = match (self.rank(a), self.rank(b)) {
            (Some(a), Some(b)) => a.cmp(&b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => Ordering::Equal,
        };
        by_rank.then_with(|| b.os_features.len().cmp(&a.os_features.len()))
    }
}

fn matches(accepted: &Platform, platform: &Platform) -> bool {
    let mut candidate = platform.normalized();
    if accepted.os == "windows" {
        candidate.os_features.retain(|feature| feature != "win32k");
    }
    accepted.os == candidate.os
        && accepted.architecture == candidate.architecture
        && accepted.variant == candidate.variant
        && (accepted.os != "windows" || windows_version_matches(&accepted.os_version, &candidate.os_version))
        && candidate
            .os_features
            .iter()
            .all(|feature| accepted.os_features.binary_search(feature).is_ok())
}

fn compatible(platform: &Platform) -> Vec<Platform> {
    let with = |architecture: &str, variant: String| Platform {
        architecture: architecture.into(),
        variant,
        ..platform.clone()
    };
    let lower = |from: &str, least: u8| -> Vec<Platform> {
        let version: u8 = from.strip_prefix('v').unwrap_or(from).parse().unwrap_or(0);
        (least..version)
            .rev()
            .map(|v| with(&platform.architecture, format!("v{v}")))
            .collect()
    };
    let mut out = vec![platform.clone()];
    match platform.architecture.as_str() {
        "amd64" => {
            out.extend(lower(&platform.variant, 1));
            out.push(with("386", String::new()));
        }
        "arm" => out.extend(lower(&platform.variant, 5)),
        "arm64" => {
            out = arm64_variants(&platform.variant)
                .into_iter()
                .map(|variant| with("arm64", variant))
                .collect();
            let variant = &platform.variant;
            let arm = if variant.is_empty() || variant.starts_with("v8") || variant.starts_with("v9") {
                "v8"
            } else {
                variant
            };
            out.extend(compatible(&with("arm", arm.into())));
        }
        _ => {}
    }
    out
}

/// The variants an arm64 CPU runs: v8.x runs v8.0 to v8.x, v9.x also runs v8.0 to v8.(x+5).
fn arm64_variants(variant: &str) -> Vec<String> {
    let text = if variant.is_empty() { "v8" } else { variant };
    let number = text.strip_prefix('v').unwrap_or_default();
    let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
    let down = |major: u8, minor: u8| {
        (0..=minor).rev().map(move |m| {
            if m == 0 {
                format!("v{major}")
            } else {
                format!("v{major}.{m}")
            }
        })
    };
    match (major, minor.parse::<u8>()) {
        ("8", Ok(minor @ 0..=9)) => down(8, minor).collect(),
        ("9", Ok(minor @ 0..=7)) => down(9, minor).chain(down(8, (minor + 5).min(9))).collect(),
        _ => Vec::new(),
    }
}

/// Long-term releases of Windows Server with a stable ABI, by build number.
const WINDOWS_LTSC: [u16; 2] = [20348, 26100];

fn windows_version_matches(host: &str, image: &str) -> bool {
    let Some(host) = windows_version(host) else {
        return true;
    };
    if image.is_empty() {
        return true;
    }
    let image = windows_version(image).unwrap_or_default();
    if (host.0, host.1) != (image.0, image.1) {
        return false;
    }
    if host.2 < WINDOWS_LTSC[0] {
        return host.2 == image.2;
    }
    let least = WINDOWS_LTSC
        .into_iter()
        .rev()
        .find(|build| host.2 > *build)
        .unwrap_or(WINDOWS_LTSC[0]);
    (least..=host.2).contains(&image.2)
}

fn windows_version(text: &str) -> Option<(u8, u8, u16)> {
    let mut parts = text.split('.');
    let version = (
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
    );
    (version != (0, 0, 0)).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        Platform::parse(text).unwrap()
    }

    #[test]
    fn only_accepts_what_the_cpu_runs() {
        for (host, image, want) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/amd64", "linux/386", true),
            ("linux/amd64", "linux/amd64/v2", false),
            ("linux/amd64/v3", "linux/amd64/v2", true),
            ("linux/amd64/v3", "linux/amd64", true),
            ("linux/arm64", "linux/arm64/v8", true),
            ("linux/arm64", "linux/arm/v7", true),
            ("linux/arm64/v8.2", "linux/arm64/v8.1", true),
            ("linux/arm64", "linux/arm64/v8.1", false),
            ("linux/arm64/v9", "linux/arm64/v8.5", true),
            ("linux/arm/v7", "linux/arm/v6", true),
            ("linux/arm/v6", "linux/arm/v7", false),
            ("linux/amd64", "windows/amd64", false),
        ] {
            assert_eq!(
                PlatformMatcher::only(&platform(host)).matches(&platform(image)),
                want,
                "{host} runs {image}"
            );
        }
    }

    #[test]
    fn strict_accepts_only_other_spellings() {
        let strict = PlatformMatcher::strict(&platform("linux/arm64"));
        assert!(strict.matches(&platform("linux/arm64/v8")));
        assert!(!strict.matches(&platform("linux/arm/v8")));
    }

    #[test]
    fn compare_prefers_the_best_match() {
        let only = PlatformMatcher::only(&platform("linux/arm64"));
        let mut images = [
            platform("linux/amd64"),
            platform("linux/arm/v6"),
            platform("linux/arm64"),
        ];
        images.sort_by(|a, b| only.compare(a, b));
        assert_eq!(images[0].architecture, "arm64");
        assert_eq!(images[2].architecture, "amd64");
    }

    #[test]
    fn windows_builds_match_within_the_stable_abi() {
        let host = platform("windows(10.0.26100)/amd64");
        let only = PlatformMatcher::only(&host);
        assert!(only.matches(&platform("windows(10.0.20348.1)/amd64")));
        assert!(only.matches(&platform("windows/amd64")));
        assert!(!only.matches(&platform("windows(10.0.17763)/amd64")));
        assert!(!PlatformMatcher::only(&platform("windows(10.0.17763)/amd64")).matches(&host));
    }
}
