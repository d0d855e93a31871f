//! Names for files and sockets that nobody else may use.

/// Makes a name of 25 characters, `0` to `9` and `a` to `v`: 125 random bits.
pub fn random_name() -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    let mut bytes = [0_u8; 25];
    // A failure leaves zeros, and making what is to have the name fails because it exists.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    let characters = bytes
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
    characters.collect()
}
