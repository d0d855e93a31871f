//! Block blobs of Azure's storage, which GitHub's second cache protocol uses as well.
//! <https://learn.microsoft.com/rest/api/storageservices/put-blob>

use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oci::Descriptor;
use registry::BlobSource;
use reqwest::{Method, Url};
use ring::hmac::{HMAC_SHA256, Key, sign};

use super::http::{Authorize, Http, ObjectError, Request};
use super::http_date;
use super::parts::Parts;

/// The version of the protocol that is spoken.
const VERSION: &str = "2021-12-02";
/// Blocks that a blob may have.
const MAX_BLOCKS: u64 = 50_000;

/// Signs with an account's key.
/// <https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key>
pub(super) struct SharedKey {
    pub account: String,
    pub key: Key,
}

impl SharedKey {
    /// Reads a key as the portal shows it; `None`: it is none.
    pub fn new(account: &str, key: &str) -> Option<Self> {
        let key = STANDARD.decode(key.trim()).ok()?;
        Some(Self {
            account: account.to_owned(),
            key: Key::new(HMAC_SHA256, &key),
        })
    }
}

impl Authorize for SharedKey {
    fn authorize(&self, request: &mut Request, now: SystemTime) {
        request.headers.push(("x-ms-date", http_date::format(now)));
        let text = string_to_sign(request, &self.account);
        let signature = STANDARD.encode(sign(&self.key, text.as_bytes()));
        let authorization = format!("SharedKey {}:{signature}", self.account);
        request.headers.push(("authorization", authorization));
    }
}

fn string_to_sign(request: &Request, account: &str) -> String {
    let value = |name: &str| {
        let found = request.headers.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.trim()).unwrap_or_default()
    };
    let length = match request.body.len() {
        0 => String::new(),
        length => length.to_string(),
    };
    // Content-Encoding, Content-Language, Content-Length, Content-MD5, Content-Type, Date, If-*, Range.
    let mut text = format!(
        "{}\n\n\n{length}\n\n{}\n\n\n\n{}\n\n{}\n",
        request.method,
        value("content-type"),
        value("if-none-match"),
        value("range"),
    );
    let mut own: Vec<(&str, &str)> = request
        .headers
        .iter()
        .filter(|(name, _)| name.starts_with("x-ms-"))
        .map(|(name, value)| (*name, value.trim()))
        .collect();
    own.sort_unstable();
    for (name, value) in own {
        text.push_str(&format!("{name}:{value}\n"));
    }
    text.push_str(&format!("/{account}{}", request.url.path()));
    let mut query: Vec<(String, String)> = request
        .url
        .query_pairs()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.into_owned()))
        .collect();
    query.sort();
    for (name, value) in query {
        text.push_str(&format!("\n{name}:{value}"));
    }
    text
}

/// A request of this protocol.
pub(super) fn request(method: Method, url: Url) -> Request {
    Request::new(method, url).header("x-ms-version", VERSION)
}

/// Writes a blob. With `only_new` one that somebody else wrote meanwhile is left alone, which is an error of the name
/// `BlobAlreadyExists`.
pub(super) async fn upload(
    http: &Http,
    authorize: &dyn Authorize,
    url: &Url,
    blob: &Descriptor,
    source: &dyn BlobSource,
    only_new: bool,
) -> Result<(), ObjectError> {
    let conditional = |request: Request| {
        if only_new {
            request.header("if-none-match", "*")
        } else {
            request
        }
    };
    let mut parts = Parts::new(source, blob, MAX_BLOCKS);
    if parts.is_single() {
        let put = request(Method::PUT, url.clone()).header("x-ms-blob-type", "BlockBlob");
        let put = conditional(put).body(parts.next().await?);
        return http.succeed(&put, authorize).await.map(drop);
    }
    let mut list = String::from("<?xml version=\"1.0\" encoding=\"utf-8\"?><BlockList>");
    for number in 0_u32.. {
        let body = parts.next().await?;
        if body.is_empty() {
            break;
        }
        // All of a blob's have to be of one length.
        let id = STANDARD.encode(format!("{number:09}"));
        let mut at = url.clone();
        at.query_pairs_mut()
            .append_pair("comp", "block")
            .append_pair("blockid", &id);
        http.succeed(&request(Method::PUT, at).body(body), authorize)
            .await?;
        list.push_str(&format!("<Latest>{id}</Latest>"));
    }
    list.push_str("</BlockList>");
    let mut at = url.clone();
    at.query_pairs_mut().append_pair("comp", "blocklist");
    let commit = request(Method::PUT, at).header("content-type", "application/xml");
    http.succeed(&conditional(commit).body(list), authorize)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_signed() {
        let url =
            Url::parse("https://acc.blob.core.windows.net/c/b%20b?comp=block&blockid=MQ%3D%3D").unwrap();
        let put = request(Method::PUT, url)
            .header("if-none-match", "*")
            .header("x-ms-date", "Sun, 06 Nov 1994 08:49:37 GMT")
            .body("abc");
        assert_eq!(
            string_to_sign(&put, "acc"),
            "PUT\n\n\n3\n\n\n\n\n\n*\n\n\nx-ms-date:Sun, 06 Nov 1994 08:49:37 GMT\nx-ms-version:2021-12-02\n\
             /acc/c/b%20b\nblockid:MQ==\ncomp:block"
        );
        let mut get =
            request(Method::GET, Url::parse("http://h/acc/c/b").unwrap()).header("range", "bytes=5-");
        SharedKey::new("acc", "a2V5")
            .unwrap()
            .authorize(&mut get, std::time::UNIX_EPOCH);
        let (name, value) = get.headers.last().unwrap();
        assert!(*name == "authorization" && value.starts_with("SharedKey acc:") && !value.contains("key"));
        assert!(SharedKey::new("acc", "no base64!").is_none());
    }
}
