//! Signatures that GnuPG and OpenSSH made of the file `text`.

use std::time::{Duration, UNIX_EPOCH};

use super::*;

macro_rules! data {
    ($name:literal) => {
        include_str!(concat!("testdata/", $name))
    };
}

const TEXT: &str = data!("text");

/// 2027, in seconds since 1970.
const YEAR_2027: u64 = 1_800_000_000;

fn check_at(seconds: u64, text: &str, signature: &str, key: &str, strict: bool) -> Result<(), String> {
    let terms = Terms {
        now: UNIX_EPOCH + Duration::from_secs(seconds),
        reject_expired: strict,
    };
    verify(text.as_bytes(), signature, key, "git", terms).map_err(|error| error.to_string())
}

fn check(text: &str, signature: &str, key: &str) -> Result<(), String> {
    check_at(YEAR_2027, text, signature, key, false)
}

#[test]
fn what_a_key_signed_holds_and_nothing_else() {
    let made = [
        (data!("rsa.pub"), data!("rsa.sig")),
        (data!("ed.pub"), data!("ed.sig")),
        (data!("nist.pub"), data!("nist.sig")),
        (data!("ssh_ed25519.pub"), data!("ssh_ed25519.sig")),
        (data!("ssh_ecdsa.pub"), data!("ssh_ecdsa.sig")),
        (data!("ssh_rsa.pub"), data!("ssh_rsa.sig")),
    ];
    for (index, (key, signature)) in made.iter().enumerate() {
        assert_eq!(check(TEXT, signature, key), Ok(()), "{index}");
        assert!(check("signed Text\n", signature, key).is_err(), "{index}");
        for (other, (key, _)) in made.iter().enumerate().filter(|(other, _)| *other != index) {
            assert!(check(TEXT, signature, key).is_err(), "{index} by {other}");
        }
    }
    // One of several keys will do.
    let ring = format!("{}\n{}", data!("ed.pub"), data!("rsa.pub"));
    assert_eq!(check(TEXT, data!("rsa.sig"), &ring), Ok(()));
    assert_eq!(check(TEXT, data!("ed.sig"), &ring), Ok(()));
    assert!(
        check(TEXT, data!("nist.sig"), &ring)
            .unwrap_err()
            .contains("unknown entity")
    );
}

#[test]
fn keys_expire_only_for_the_strict() {
    let (key, signature) = (data!("expired.pub"), data!("expired.sig"));
    assert_eq!(check(TEXT, signature, key), Ok(()));
    let error = check_at(YEAR_2027, TEXT, signature, key, true).unwrap_err();
    assert!(error.ends_with("key expired"), "{error}");
    let in_2020 = 1_580_000_000;
    assert_eq!(check_at(in_2020, TEXT, signature, key, true), Ok(()));
    let error = check_at(1_500_000_000, TEXT, signature, key, false).unwrap_err();
    assert!(error.contains("in the future"), "{error}");
}

#[test]
fn a_key_that_was_taken_back_is_no_key() {
    let error = check(TEXT, data!("revoked.sig"), data!("revoked.pub")).unwrap_err();
    assert!(error.ends_with("key revoked"), "{error}");
}

#[test]
fn ssh_signatures_are_for_one_purpose() {
    let terms = Terms {
        now: UNIX_EPOCH,
        reject_expired: false,
    };
    let (signature, key) = (data!("ssh_ed25519.sig"), data!("ssh_ed25519.pub"));
    let error = verify(TEXT.as_bytes(), signature, key, "file", terms).unwrap_err();
    assert_eq!(error.to_string(), "rejecting ssh signature namespace: git");
    let with_options = format!("# mine\nno-pty,from=\"*\" {key}");
    assert_eq!(check(TEXT, signature, &with_options), Ok(()));
}

#[test]
fn keys_of_the_other_kind_are_told_apart() {
    let error = check(TEXT, data!("ssh_rsa.sig"), data!("rsa.pub")).unwrap_err();
    assert!(error.starts_with("failed to parse ssh public key"), "{error}");
    let error = check(TEXT, data!("rsa.sig"), data!("ssh_rsa.pub")).unwrap_err();
    assert!(error.starts_with("failed to read armored public key"), "{error}");
    assert_eq!(
        check(TEXT, "text", data!("rsa.pub")),
        Err("invalid signature format".to_owned())
    );
}

#[test]
fn nothing_malformed_is_read_or_panics() {
    for (key, signature) in [
        (data!("rsa.pub"), data!("rsa.sig")),
        (data!("ed.pub"), data!("ed.sig")),
        (data!("ssh_ecdsa.pub"), data!("ssh_ecdsa.sig")),
    ] {
        let (body, end) = signature.rsplit_once("-----END").unwrap();
        for cut in (0..body.len() - 10).step_by(7) {
            let shortened = format!("{}\n-----END{end}", &body[..cut]);
            assert!(check(TEXT, &shortened, key).is_err(), "{cut}");
            let replaced: String = body
                .char_indices()
                .map(|(at, c)| {
                    if at == cut && c.is_ascii_alphabetic() {
                        '/'
                    } else {
                        c
                    }
                })
                .collect();
            // Whatever it is now, reading it ends.
            let _ = check(TEXT, &format!("{replaced}-----END{end}"), key);
        }
        for cut in (0..key.len()).step_by(7) {
            assert!(
                check(TEXT, signature, &key[..cut]).is_err() || cut + 8 > key.len(),
                "{cut}"
            );
        }
    }
}
