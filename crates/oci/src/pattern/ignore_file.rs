//! The file `.dockerignore`.

use crate::path;

/// Returns the patterns of an ignore file: no comments, no blank lines, cleaned, without leading slashes.
///
/// Bytes that are not UTF-8 are replaced. Lines are as long as they are: the caller bounds the file.
pub fn read_ignore_file(content: &[u8]) -> Vec<String> {
    let content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
    let content = String::from_utf8_lossy(content);
    content
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(read_line)
        .collect()
}

fn read_line(line: &str) -> Option<String> {
    let line = line.trim();
    if line.is_empty() {
        return None;
    }
    let (exclusion, pattern) = line
        .strip_prefix('!')
        .map_or(("", line), |rest| ("!", rest.trim()));
    if pattern.is_empty() {
        return Some(exclusion.into());
    }
    let cleaned = path::clean(pattern);
    let relative = if cleaned.len() > 1 {
        cleaned.strip_prefix('/').unwrap_or(&cleaned)
    } else {
        &cleaned
    };
    Some(format!("{exclusion}{relative}"))
}
