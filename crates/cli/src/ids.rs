//! Random names: 25 lower-case letters and digits, as clients name their builds and sessions.

/// Makes a name nobody else makes.
pub fn new_id() -> String {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    let mut number = u128::from_be_bytes(bytes);
    let mut name = vec![b'0'; 25];
    for digit in name.iter_mut().rev() {
        let value = u8::try_from(number % 36).unwrap_or_default();
        *digit = if value < 10 {
            b'0' + value
        } else {
            b'a' + value - 10
        };
        number /= 36;
    }
    name.into_iter().map(char::from).collect()
}

fn fill_random(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        // Only interruptions fail here, and they are tried again.
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ() {
        let (one, two) = (new_id(), new_id());
        assert_eq!((one.len(), two.len()), (25, 25));
        assert_ne!(one, two);
        assert!(
            one.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        );
    }
}
