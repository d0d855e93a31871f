//! What an HTTP vertex asks for, and how that identifies it.

use build::error::{BuildError, ErrorKind};
use llb::pb;
use oci::Digest;
use reqwest::Url;
use serde::Serialize;

use super::Resolved;
use super::ask::without_account;
use super::name::{format_http_date, from_disposition, parse_http_date, safe};
use super::signed::Demand;
use crate::percent;

/// The vertex's URL and attributes, read.
#[derive(Clone, Debug)]
pub(super) struct Attributes {
    /// Where the file is.
    pub url: Url,
    /// The URL as the client wrote it, which is part of keys.
    text: String,
    checksum: Option<Digest>,
    file: String,
    /// Permission bits; 0: 0600.
    pub perm: i64,
    /// Owner.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Secret that has the `Authorization` header's value.
    pub auth_secret: Option<String>,
    /// Further headers by canonical name.
    pub headers: Vec<(String, String)>,
    /// By what the file must be signed.
    pub demand: Option<Demand>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct HeaderJson<'a> {
    name: &'a str,
    value: &'a str,
}

impl Attributes {
    pub fn read(source: &pb::SourceOp) -> Result<Self, BuildError> {
        let url = Url::parse(&source.identifier)
            .map_err(|error| BuildError::user(format!("invalid URL {:?}: {error}", source.identifier)))?;
        let mut this = Self {
            url,
            text: source.identifier.clone(),
            checksum: None,
            file: String::new(),
            perm: 0,
            uid: 0,
            gid: 0,
            auth_secret: None,
            headers: Vec::new(),
            demand: None,
        };
        for (key, value) in &source.attrs {
            this.set(key, value)?;
        }
        this.headers.sort();
        if let Some(demand) = &this.demand {
            demand.validate()?;
        }
        Ok(this)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), BuildError> {
        match key {
            "http.checksum" => {
                let digest = value
                    .parse()
                    .map_err(|error| BuildError::user(format!("invalid {key} {value:?}: {error}")))?;
                self.checksum = Some(digest);
            }
            "http.filename" => value.clone_into(&mut self.file),
            "http.perm" => self.perm = number(key, value)?,
            "http.uid" => self.uid = number(key, value)?,
            "http.gid" => self.gid = number(key, value)?,
            "http.authheadersecret" => {
                self.auth_secret = Some(value.to_owned()).filter(|name| !name.is_empty())
            }
            "http.sig.pubkey" => value.clone_into(&mut self.demand.get_or_insert_default().public_key),
            "http.sig.signature" => value.clone_into(&mut self.demand.get_or_insert_default().signature),
            _ => {
                let header = key.strip_prefix("http.header.").map(str::to_ascii_lowercase);
                match header.as_deref() {
                    Some("accept") => self.headers.push(("Accept".to_owned(), value.to_owned())),
                    Some("user-agent") => self.headers.push(("User-Agent".to_owned(), value.to_owned())),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// The host of the URL.
    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    /// The URL without credentials, for people.
    pub fn shown_url(&self) -> String {
        without_account(&self.url).into()
    }

    /// What a pinned checksum says without asking the server. Whether a file is signed cannot be told without it.
    pub fn pinned(&self) -> Option<Resolved> {
        let digest = self.checksum.filter(|_| self.demand.is_none())?;
        Some(Resolved {
            digest,
            filename: self.filename(None),
            last_modified: None,
            reference: None,
        })
    }

    /// Compares with the pinned checksum.
    pub fn check(&self, digest: Digest) -> Result<(), BuildError> {
        match self.checksum {
            Some(expected) if expected != digest => Err(BuildError::new(
                ErrorKind::User,
                format!(
                    "digest mismatch for {}: {digest} (expected: {expected})",
                    self.shown_url()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Name of the file: the one asked for, the server's, or the URL's last part.
    pub fn filename(&self, disposition: Option<&str>) -> String {
        if !self.file.is_empty() {
            return safe(&self.file);
        }
        if let Some(name) = disposition.and_then(from_disposition) {
            return safe(&name);
        }
        let path = percent::decoded(self.url.path());
        match oci::path::base(&path) {
            "." | "/" => safe(""),
            base => safe(base),
        }
    }

    fn header_json(&self) -> Vec<HeaderJson<'_>> {
        self.headers
            .iter()
            .map(|(name, value)| HeaderJson { name, value })
            .collect()
    }

    /// Under what the file is kept: everything that shapes the ref.
    pub fn index(&self) -> Result<String, BuildError> {
        #[derive(Serialize)]
        struct Document<'a> {
            url: &'a str,
            file: &'a str,
            owner: [i64; 3],
            secret: Option<&'a str>,
            headers: Vec<HeaderJson<'a>>,
        }
        let document = Document {
            url: &self.text,
            file: &self.file,
            owner: [self.perm, self.uid, self.gid],
            secret: self.auth_secret.as_deref(),
            headers: self.header_json(),
        };
        Ok(format!("http:{}", digest(&document)?))
    }

    /// The source's key, as BuildKit makes it.
    pub fn key(
        &self,
        filename: &str,
        checksum: Digest,
        last_modified: Option<&str>,
    ) -> Result<Digest, BuildError> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Document<'a> {
            filename: &'a str,
            perm: i64,
            #[serde(rename = "UID")]
            uid: i64,
            #[serde(rename = "GID")]
            gid: i64,
            checksum: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            last_mod_time: Option<String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            auth_header_secret: Option<&'a str>,
            #[serde(skip_serializing_if = "Vec::is_empty")]
            header: Vec<HeaderJson<'a>>,
        }
        digest(&Document {
            filename,
            perm: self.perm,
            uid: self.uid,
            gid: self.gid,
            checksum: checksum.to_string(),
            last_mod_time: last_modified.and_then(parse_http_date).map(format_http_date),
            auth_header_secret: self.auth_secret.as_deref(),
            header: self.header_json(),
        })
    }
}

fn digest(document: &impl Serialize) -> Result<Digest, BuildError> {
    let bytes =
        oci::json::to_vec(document).map_err(|error| BuildError::internal(format!("http key: {error}")))?;
    Ok(Digest::sha256(bytes))
}

/// Numbers as Go reads them: decimal, 0 and 0o for octal, 0x for hexadecimal.
fn number(key: &str, value: &str) -> Result<i64, BuildError> {
    let parsed = if let Some(hex) = value.strip_prefix("0x") {
        i64::from_str_radix(hex, 16)
    } else if let Some(octal) = value
        .strip_prefix("0o")
        .or_else(|| value.strip_prefix('0').filter(|rest| !rest.is_empty()))
    {
        i64::from_str_radix(octal, 8)
    } else {
        value.parse()
    };
    parsed.map_err(|error| BuildError::user(format!("invalid {key} {value:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str, attrs: &[(&str, &str)]) -> Attributes {
        let attrs = attrs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Attributes::read(&pb::SourceOp {
            identifier: url.to_owned(),
            attrs,
        })
        .expect("is valid")
    }

    #[test]
    fn names_files() {
        assert_eq!(read("http://h/a/b.txt?c=d", &[]).filename(None), "b.txt");
        assert_eq!(read("http://h/a%20b", &[]).filename(None), "a b");
        assert_eq!(read("http://h/", &[]).filename(None), "download");
        assert_eq!(
            read("http://h/", &[]).filename(Some("attachment; filename=\"../x\"")),
            "x"
        );
        assert_eq!(
            read("http://h/a", &[("http.filename", "/etc/passwd")]).filename(None),
            "passwd"
        );
        assert_eq!(
            read("http://h/a", &[("http.filename", "..")]).filename(None),
            "download"
        );
    }

    #[test]
    fn reads_numbers_as_go_does() {
        assert_eq!(read("http://h/a", &[("http.perm", "0644")]).perm, 0o644);
        assert_eq!(read("http://h/a", &[("http.perm", "0")]).perm, 0);
        assert_eq!(read("http://h/a", &[("http.uid", "1000")]).uid, 1000);
    }

    #[test]
    fn hides_credentials() {
        assert_eq!(read("http://u:p@h/a", &[]).shown_url(), "http://h/a");
    }
}
