//! What to do about a failure, for people at a terminal.

/// Texts of failures and what helps; the first that fits is shown.
const HINTS: [(&[&str], &str); 7] = [
    (
        &["no space left on device"],
        "free some space on the disk of the state directory, for example with `cooper prune --all`",
    ),
    (
        &[
            "401 unauthorized",
            "403 forbidden",
            "push access denied",
            "pull access denied",
        ],
        "log in to the registry with an account that may do this, for example with `docker login`; accounts are read from \
         config.json in $DOCKER_CONFIG or ~/.docker",
    ),
    (
        &["failed to calculate checksum of ref"],
        "sources of COPY and ADD lie in the build context: see whether the name is right and .dockerignore lets it through",
    ),
    (
        &["failed to read dockerfile: open"],
        "name the Dockerfile with --file, and the directory of the build context as the last argument",
    ),
    (
        &[
            "server gave http response to https client",
            "invalid http version",
            "corrupt message",
        ],
        "a registry without TLS has to be named in cooperd.toml: [registry.\"HOST\"] with http = true",
    ),
    (
        &["failed to do request"],
        "see whether the registry is up and can be reached from here; mirrors and certificates are set in cooperd.toml",
    ),
    (
        &["is not allowed", "not enabled on this daemon"],
        "grant the right with --allow, and on a daemon's side with insecure-entitlements",
    ),
];

/// Returns what helps against a failure of this text, if anything is known to.
pub(super) fn hint(message: &str) -> Option<&'static str> {
    let message = message.to_lowercase();
    HINTS
        .iter()
        .find(|(texts, _)| texts.iter().any(|text| message.contains(text)))
        .map(|(_, hint)| *hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_failures_have_a_way_out() {
        for (message, word) in [
            ("RUN x: write /a: No space left on device", "prune"),
            (
                "failed to build: failed to solve: unexpected status from HEAD request to http://r/v2/: 401 Unauthorized",
                "docker login",
            ),
            (
                "failed to compute cache key: failed to calculate checksum of ref x: \"/y\": not found",
                ".dockerignore",
            ),
            (
                "failed to do request: HEAD \"https://r/v2/\": connection refused",
                "reached",
            ),
            ("failed to load LLB: security.insecure is not allowed", "--allow"),
        ] {
            assert!(hint(message).is_some_and(|hint| hint.contains(word)), "{message}");
        }
        assert_eq!(
            hint("process \"/bin/sh -c false\" did not complete successfully: exit code: 1"),
            None
        );
    }
}
