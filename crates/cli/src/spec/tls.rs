//! `--registry-auth-tlscontext`: how to reach a registry's token server.

use std::collections::BTreeMap;

use super::{SpecError, go_bool, key_values};

/// TLS of the connections to one host's token server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthTls {
    /// Files with further root certificates.
    pub roots: Vec<String>,
    /// Files with a client certificate and its key.
    pub key_pairs: Vec<(String, String)>,
    /// Whether the server's certificate is not verified.
    pub insecure: bool,
}

/// Reads all contexts, by host; several of one host are joined.
///
/// # Errors
/// For a missing host, or nothing that a context would change.
pub fn auth_tls(values: &[String]) -> Result<BTreeMap<String, AuthTls>, SpecError> {
    let mut hosts: BTreeMap<String, AuthTls> = BTreeMap::new();
    for value in values {
        let (mut host, mut ca, mut cert, mut key, mut insecure) =
            (String::new(), String::new(), String::new(), String::new(), false);
        for (name, value) in key_values(value)? {
            match name.as_str() {
                "host" => host = value,
                "ca" => ca = value,
                "cert" => cert = value,
                "key" => key = value,
                "insecure" => insecure = go_bool(&value).unwrap_or(false),
                _ => {}
            }
        }
        let refuse = |what: &str| {
            Err(SpecError::invalid(format!(
                "--registry-auth-tlscontext requires {what}"
            )))
        };
        if host.is_empty() {
            return refuse("host=<host>");
        }
        if ca.is_empty() && !insecure && (cert.is_empty() || key.is_empty()) {
            return refuse("ca=<ca> or cert=<cert>,key=<key> or insecure=true");
        }
        if !ca.is_empty() && cert.is_empty() != key.is_empty() {
            return refuse("cert=<cert>,key=<key>");
        }
        let entry = hosts.entry(host).or_default();
        entry.insecure |= insecure;
        entry.roots.extend((!ca.is_empty()).then_some(ca));
        entry
            .key_pairs
            .extend((!cert.is_empty() && !key.is_empty()).then_some((cert, key)));
    }
    Ok(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_contexts_of_a_host() {
        let values = ["host=h,ca=a", "host=h,cert=c,key=k", "host=i,insecure=true"].map(str::to_owned);
        let hosts = auth_tls(&values).unwrap();
        assert_eq!(hosts["h"].roots, ["a"]);
        assert_eq!(hosts["h"].key_pairs, [("c".to_owned(), "k".to_owned())]);
        assert!(hosts["i"].insecure && !hosts["h"].insecure);
    }

    #[test]
    fn refuses_contexts_without_effect() {
        for bad in ["ca=a", "host=h", "host=h,cert=c", "host=h,ca=a,key=k"] {
            assert!(auth_tls(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}
