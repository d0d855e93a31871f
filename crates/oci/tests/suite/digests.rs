//! Digests: text both ways, errors, chain IDs.

use std::io::Write as _;

use oci::{Algorithm, Digest, DigestError, Digester, chain_id, chain_ids};
use proptest::prelude::*;

const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn known_digests() {
    assert_eq!(Digest::sha256("").to_string(), EMPTY);
    assert_eq!(Digest::sha256("").hex(), EMPTY[7..]);
    assert!(
        Digest::of(Algorithm::Sha384, "")
            .to_string()
            .starts_with("sha384:38b060a7")
    );
    assert!(
        Digest::of(Algorithm::Sha512, "")
            .to_string()
            .starts_with("sha512:cf83e135")
    );
    assert_eq!(
        serde_json::to_string(&Digest::sha256("")).unwrap(),
        format!("{EMPTY:?}")
    );
    assert!(serde_json::from_str::<Digest>("\"sha256:\"").is_err());
}

#[test]
fn errors_are_gos() {
    for (text, want) in [
        ("", DigestError::Format),
        ("sha256", DigestError::Format),
        (":abc", DigestError::Format),
        ("sha256:", DigestError::Format),
        ("sha256:abc", DigestError::Length),
        (&EMPTY.to_uppercase().replace("SHA", "sha"), DigestError::Format),
        ("md5:abc", DigestError::Unsupported),
        ("foo+b64:aGk=", DigestError::Unsupported),
        ("Foo:abc", DigestError::Format),
        ("foo:a/b", DigestError::Format),
        (&format!("{}é", &EMPTY[..EMPTY.len() - 2]), DigestError::Format),
    ] {
        assert_eq!(text.parse::<Digest>().unwrap_err(), want, "{text}");
    }
}

#[test]
fn chain_ids_follow_the_specification() {
    let (a, b) = (Digest::sha256("a"), Digest::sha256("b"));
    assert_eq!(chain_id(&[]), None);
    assert_eq!(chain_id(&[a]), Some(a));
    assert_eq!(chain_ids(&[a, b]), [a, Digest::sha256(format!("{a} {b}"))]);
}

proptest! {
    #[test]
    fn text_survives(bytes: Vec<u8>, which in 0..3) {
        let algorithm = [Algorithm::Sha256, Algorithm::Sha384, Algorithm::Sha512][usize::try_from(which).unwrap()];
        let digest = Digest::of(algorithm, &bytes);
        prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        prop_assert_eq!(Digest::from_hash(algorithm, digest.as_bytes()).unwrap(), digest);
    }

    #[test]
    fn order_is_that_of_the_text(a: Vec<u8>, b: Vec<u8>) {
        let (a, b) = (Digest::sha256(a), Digest::of(Algorithm::Sha512, b));
        prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
    }

    #[test]
    fn pieces_make_the_same_digest(pieces: Vec<Vec<u8>>) {
        let mut digester = Digester::sha256();
        for piece in &pieces {
            digester.write_all(piece).unwrap();
        }
        prop_assert_eq!(digester.finish(), Digest::sha256(pieces.concat()));
    }

    #[test]
    fn any_text_is_read_or_refused(text: String) {
        if let Ok(digest) = text.parse::<Digest>() {
            prop_assert_eq!(digest.to_string(), text);
        }
    }
}
