//! Signature version 4 of Amazon Web Services, for S3: the path is encoded once, the body's digest is a header.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html>

use std::fmt::Write;
use std::time::SystemTime;

use oci::Digest;
use ring::hmac::{HMAC_SHA256, Key, sign};

use super::credentials::AwsCredentials;
use super::http::{Authorize, Request};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// Signs requests to one region.
pub(super) struct Signer<'a> {
    pub credentials: &'a AwsCredentials,
    pub region: &'a str,
}

impl Authorize for Signer<'_> {
    fn authorize(&self, request: &mut Request, now: SystemTime) {
        let (seconds, _) = oci::timestamp::to_unix(now);
        let time: String = oci::timestamp::format(seconds, 0)
            .chars()
            .filter(|c| !matches!(c, '-' | ':'))
            .collect();
        let date = time.get(..8).unwrap_or_default().to_owned();
        let body = hex_digest(&request.body);
        request.headers.push(("x-amz-date", time.clone()));
        request.headers.push(("x-amz-content-sha256", body.clone()));
        if let Some(token) = &self.credentials.session_token {
            request.headers.push(("x-amz-security-token", token.clone()));
        }
        let (canonical, signed) = canonical_request(request, &body);
        let scope = format!("{date}/{}/s3/aws4_request", self.region);
        let text = format!(
            "{ALGORITHM}\n{time}\n{scope}\n{}",
            hex_digest(canonical.as_bytes())
        );
        let mut key = sign(
            &Key::new(
                HMAC_SHA256,
                format!("AWS4{}", self.credentials.secret_access_key).as_bytes(),
            ),
            date.as_bytes(),
        );
        for part in [self.region, "s3", "aws4_request"] {
            key = sign(&Key::new(HMAC_SHA256, key.as_ref()), part.as_bytes());
        }
        let signature = sign(&Key::new(HMAC_SHA256, key.as_ref()), text.as_bytes());
        let authorization = format!(
            "{ALGORITHM} Credential={}/{scope},SignedHeaders={signed},Signature={}",
            self.credentials.access_key_id,
            hex(signature.as_ref())
        );
        request.headers.push(("authorization", authorization));
    }
}

/// The request as it is signed, and the names of the headers in it. The query is expected sorted and encoded.
fn canonical_request(request: &Request, body: &str) -> (String, String) {
    let mut headers: Vec<(&str, String)> = request
        .headers
        .iter()
        .map(|(name, value)| (*name, value.trim().to_owned()))
        .collect();
    headers.push(("host", request.host()));
    headers.sort();
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let signed = names.join(";");
    let mut text = format!(
        "{}\n{}\n{}\n",
        request.method,
        request.url.path(),
        request.url.query().unwrap_or_default()
    );
    for (name, value) in &headers {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}:{value}");
    }
    let _ = write!(text, "\n{signed}\n{body}");
    (text, signed)
}

fn hex_digest(bytes: &[u8]) -> String {
    let digest = Digest::sha256(bytes).to_string();
    digest.trim_start_matches("sha256:").to_owned()
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use reqwest::{Method, Url};

    use super::*;

    fn signature(mut request: Request) -> String {
        let credentials = AwsCredentials {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
            session_token: None,
        };
        let signer = Signer {
            credentials: &credentials,
            region: "us-east-1",
        };
        // 2013-05-24T00:00:00Z.
        signer.authorize(&mut request, UNIX_EPOCH + Duration::from_secs(1_369_353_600));
        let (_, value) = request.headers.pop().unwrap();
        value
    }

    /// The examples of the specification.
    #[test]
    fn signs_as_specified() {
        let url = |path: &str| Url::parse(&format!("https://examplebucket.s3.amazonaws.com{path}")).unwrap();
        let get = Request::new(Method::GET, url("/test.txt")).header("range", "bytes=0-9");
        assert_eq!(
            signature(get),
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
             SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
             Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let put = Request::new(Method::PUT, url("/test%24file.text"))
            .header("date", "Fri, 24 May 2013 00:00:00 GMT")
            .header("x-amz-storage-class", "REDUCED_REDUNDANCY")
            .body("Welcome to Amazon S3.");
        assert!(
            signature(put)
                .ends_with("Signature=98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd")
        );
        let list = Request::new(Method::GET, url("/?max-keys=2&prefix=J"));
        assert!(
            signature(list)
                .ends_with("Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")
        );
    }
}
