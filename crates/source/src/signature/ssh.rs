//! SSH signatures (`PROTOCOL.sshsig`): of Ed25519, ECDSA and RSA keys.

use ring::digest::{SHA256, SHA512, digest};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA512, RsaPublicKeyComponents,
};

use super::{Reader, SignatureError, base64, holds, padded};

/// How a signature begins.
pub(super) const ARMOR: &str = "-----BEGIN SSH SIGNATURE-----";
const ARMOR_END: &str = "-----END SSH SIGNATURE-----";
const MAGIC: &[u8] = b"SSHSIG";
const ECDSA_256: &[u8] = b"ecdsa-sha2-nistp256";
const ECDSA_384: &[u8] = b"ecdsa-sha2-nistp384";

/// A signature's parts; nothing of it is verified.
struct Signature<'a> {
    key: &'a [u8],
    namespace: &'a [u8],
    reserved: &'a [u8],
    hash: &'a [u8],
    algorithm: &'a [u8],
    bytes: &'a [u8],
}

impl<'a> Signature<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let mut from = Reader(bytes.strip_prefix(MAGIC)?);
        if from.number(4)? != 1 {
            return None;
        }
        let (key, namespace) = (from.string(4)?, from.string(4)?);
        let (reserved, hash) = (from.string(4)?, from.string(4)?);
        let mut signature = Reader(from.string(4)?);
        let (algorithm, bytes) = (signature.string(4)?, signature.string(4)?);
        let is_whole = from.0.is_empty() && signature.0.is_empty();
        is_whole.then_some(Self {
            key,
            namespace,
            reserved,
            hash,
            algorithm,
            bytes,
        })
    }

    /// The bytes that were signed in place of the message.
    fn signed(&self, message: &[u8]) -> Result<Vec<u8>, SignatureError> {
        let hash = match self.hash {
            b"sha256" => digest(&SHA256, message),
            b"sha512" => digest(&SHA512, message),
            other => return Err(rejected("ssh signature hash algorithm", other)),
        };
        let mut out = MAGIC.to_vec();
        for part in [self.namespace, self.reserved, self.hash, hash.as_ref()] {
            let length = u32::try_from(part.len()).map_err(|_| SignatureError::Ssh("a part is too long"))?;
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(part);
        }
        Ok(out)
    }
}

fn rejected(what: &'static str, name: &[u8]) -> SignatureError {
    SignatureError::Rejected {
        what,
        name: String::from_utf8_lossy(name).into_owned(),
    }
}

/// Reads a key as `authorized_keys` has it: the type, the key, a comment; options may go before.
fn read_key(text: &str) -> Result<Vec<u8>, SignatureError> {
    let lines = text.lines().map(str::trim);
    let line = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.windows(2).find_map(|pair| {
                let key = base64(std::iter::once(pair[1]))?;
                let kind = Reader(&key).string(4)?;
                (kind == pair[0].as_bytes()).then_some(key)
            })
        });
    line.ok_or(SignatureError::SshKey("no key found"))
}

fn dearmored(text: &str) -> Option<Vec<u8>> {
    let body = text.strip_prefix(ARMOR)?.split(ARMOR_END).next()?;
    base64(body.lines())
}

/// Checks a signature.
pub(super) fn verify(
    message: &[u8],
    armored: &str,
    public_key: &str,
    namespace: &str,
) -> Result<(), SignatureError> {
    let bytes = dearmored(armored).ok_or(SignatureError::Ssh("it is not in armor"))?;
    let signature = Signature::read(&bytes).ok_or(SignatureError::Ssh("it is malformed"))?;
    if signature.namespace != namespace.as_bytes() {
        return Err(rejected("ssh signature namespace", signature.namespace));
    }
    let key = read_key(public_key)?;
    // The signature says which key made it, and that must be the one that is trusted.
    if key != signature.key {
        return Err(SignatureError::Mismatch("ssh"));
    }
    let signed = signature.signed(message)?;
    let holds = check(&key, &signature, &signed)?;
    holds.then_some(()).ok_or(SignatureError::Mismatch("ssh"))
}

fn check(key: &[u8], signature: &Signature<'_>, signed: &[u8]) -> Result<bool, SignatureError> {
    let malformed = || SignatureError::SshKey("it is malformed");
    let mut key = Reader(key);
    let kind = key.string(4).ok_or_else(malformed)?;
    let is_right = match (kind, signature.algorithm) {
        (b"ssh-ed25519", b"ssh-ed25519") => {
            let point = key.string(4).ok_or_else(malformed)?;
            holds(&ED25519, point, signed, signature.bytes)
        }
        (ECDSA_256, ECDSA_256) => {
            key.string(4).ok_or_else(malformed)?;
            let point = key.string(4).ok_or_else(malformed)?;
            let fixed = pair(signature.bytes, 32);
            fixed.is_some_and(|fixed| holds(&ECDSA_P256_SHA256_FIXED, point, signed, &fixed))
        }
        (ECDSA_384, ECDSA_384) => {
            key.string(4).ok_or_else(malformed)?;
            let point = key.string(4).ok_or_else(malformed)?;
            let fixed = pair(signature.bytes, 48);
            fixed.is_some_and(|fixed| holds(&ECDSA_P384_SHA384_FIXED, point, signed, &fixed))
        }
        (b"ssh-rsa", algorithm @ (b"rsa-sha2-256" | b"rsa-sha2-512")) => {
            let (e, n) = (key.string(4), key.string(4));
            let (e, n) = e.zip(n).ok_or_else(malformed)?;
            let parameters = if algorithm == b"rsa-sha2-256" {
                &RSA_PKCS1_2048_8192_SHA256
            } else {
                &RSA_PKCS1_2048_8192_SHA512
            };
            let key = RsaPublicKeyComponents {
                n: without_sign(n),
                e: without_sign(e),
            };
            key.verify(parameters, signed, signature.bytes).is_ok()
        }
        (_, algorithm) => return Err(rejected("ssh signature algorithm", algorithm)),
    };
    Ok(is_right)
}

/// The two numbers of an ECDSA signature, one after the other.
fn pair(bytes: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut from = Reader(bytes);
    let mut out = padded(from.string(4)?, length)?;
    out.extend(padded(from.string(4)?, length)?);
    from.0.is_empty().then_some(out)
}

/// A positive number is written with a zero before it when its first bit is set.
fn without_sign(number: &[u8]) -> &[u8] {
    number.strip_prefix(&[0]).unwrap_or(number)
}
