//! Lists of strings in headers of calls, which may only have printable ASCII.

use std::collections::BTreeMap;

use tonic::metadata::{AsciiMetadataKey, KeyAndValueRef, MetadataMap, MetadataValue};

const SUFFIX: &str = "-encoded";

/// Returns headers with these lists; a list with anything but printable ASCII is encoded and marked.
///
/// Keys that cannot be the name of a header are left out: they come from this program.
pub fn encode_lists<'a>(lists: impl IntoIterator<Item = (&'a str, &'a [String])>) -> MetadataMap {
    let mut map = MetadataMap::new();
    let mut append = |key: &str, value: &str| {
        if let (Ok(key), Ok(value)) = (key.parse::<AsciiMetadataKey>(), MetadataValue::try_from(value)) {
            map.append(key, value);
        }
    };
    for (key, list) in lists {
        let plain = list
            .iter()
            .all(|value| value.bytes().all(|c| (b' '..=b'~').contains(&c)));
        for value in list {
            if plain {
                append(key, value)
            } else {
                append(key, &query_escape(value))
            }
        }
        if !plain {
            append(&format!("{key}{SUFFIX}"), "1");
        }
    }
    map
}

/// Returns the lists in headers, decoded where they are marked so. Binary headers are left out.
pub fn decode_lists(map: &MetadataMap) -> BTreeMap<String, Vec<String>> {
    let mut lists: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in map.iter() {
        if let KeyAndValueRef::Ascii(key, value) = entry
            && let Ok(value) = value.to_str()
        {
            lists
                .entry(key.as_str().to_owned())
                .or_default()
                .push(value.to_owned());
        }
    }
    let is_true = |list: &Vec<String>| {
        list.first()
            .is_some_and(|first| matches!(first.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True"))
    };
    let marked: Vec<String> = lists
        .iter()
        .filter(|(_, list)| is_true(list))
        .filter_map(|(key, _)| key.strip_suffix(SUFFIX).map(str::to_owned))
        .collect();
    for key in marked {
        for value in lists.get_mut(&key).into_iter().flatten() {
            *value = query_unescape(value);
        }
    }
    lists
}

/// Escapes as Go's `url.QueryEscape`.
fn query_escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    for c in text.bytes() {
        match c {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(c)),
            b' ' => out.push('+'),
            c => out.push_str(&format!("%{c:02X}")),
        }
    }
    out
}

/// Undoes [`query_escape`]; empty where the text is not escaped well, as in Go.
fn query_unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(c) = bytes.next() {
        match c {
            b'+' => out.push(b' '),
            b'%' => {
                let mut digit = || bytes.next().and_then(|c| char::from(c).to_digit(16));
                let (Some(high), Some(low)) = (digit(), digit()) else {
                    return String::new();
                };
                out.push(u8::try_from(high * 16 + low).unwrap_or(0));
            }
            c => out.push(c),
        }
    }
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_survive_headers() {
        let lists: [(&str, Vec<String>); 3] = [
            ("include-patterns", vec!["a b".into(), "100%+".into()]),
            ("exclude-patterns", vec!["ü/+ %".into(), "plain".into()]),
            ("dir-name", vec!["line\nbreak".into()]),
        ];
        let map = encode_lists(lists.iter().map(|(key, list)| (*key, list.as_slice())));
        assert!(map.get("include-patterns-encoded").is_none());
        assert_eq!(
            map.get_all("exclude-patterns").iter().next().unwrap(),
            "%C3%BC%2F%2B+%25"
        );
        let decoded = decode_lists(&map);
        for (key, list) in lists {
            assert_eq!(decoded[key], list);
        }
    }
}
