//! `--secret`: `id=token,src=file`, `id=token,env=TOKEN`, `type=env,id=token`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::SpecError;
use crate::format::csv;

/// Longest secret in bytes.
pub const MAX_SECRET_BYTES: u64 = 500 * 1024;

/// Where a secret's bytes come from when a build asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretOrigin {
    /// A file.
    File(PathBuf),
    /// A variable of this process' environment.
    Env(String),
}

/// Reads all secrets of a build, by id. A secret without an origin is the variable of its id, else the file.
///
/// # Errors
/// For an unknown key, a missing id, or a file that is missing or too long.
pub fn secrets(
    values: &[String],
    has_env: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, SecretOrigin>, SpecError> {
    let mut secrets = BTreeMap::new();
    for value in values {
        let (id, origin) = secret(value, &has_env)?;
        if let SecretOrigin::File(path) = &origin {
            let found = std::fs::metadata(path).map_err(|source| SpecError::File {
                context: format!("failed to stat {}", path.display()),
                source,
            })?;
            if found.len() > MAX_SECRET_BYTES {
                return Err(SpecError::invalid(format!(
                    "secret {id} too big. max size 500KiB"
                )));
            }
        }
        secrets.insert(id, origin);
    }
    Ok(secrets)
}

fn secret(value: &str, has_env: &impl Fn(&str) -> bool) -> Result<(String, SecretOrigin), SpecError> {
    let fields = csv::fields(value).map_err(|source| SpecError::Csv {
        context: "failed to parse csv secret: ",
        source,
    })?;
    let (mut id, mut file, mut env, mut kind) = (String::new(), String::new(), String::new(), String::new());
    for field in &fields {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| SpecError::invalid(format!("invalid field '{field}' must be a key=value pair")))?;
        let key = key.to_lowercase();
        match key.as_str() {
            "type" if value == "file" || value == "env" => value.clone_into(&mut kind),
            "type" => return Err(SpecError::invalid(format!("unsupported secret type {value:?}"))),
            "id" => value.clone_into(&mut id),
            "source" | "src" => value.clone_into(&mut file),
            "env" => value.clone_into(&mut env),
            _ => return Err(SpecError::invalid(format!("unexpected key '{key}' in '{field}'"))),
        }
    }
    if kind == "env" && env.is_empty() {
        env = std::mem::take(&mut file);
    }
    if id.is_empty() {
        return Err(SpecError::invalid("secret missing ID"));
    }
    if env.is_empty() && file.is_empty() {
        if has_env(&id) {
            env.clone_from(&id);
        } else {
            file.clone_from(&id);
        }
    }
    let origin = if env.is_empty() {
        SecretOrigin::File(PathBuf::from(file))
    } else {
        SecretOrigin::Env(env)
    };
    Ok((id, origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(value: &str) -> Result<SecretOrigin, String> {
        let secrets =
            secrets(&[value.to_owned()], |name| name == "SET").map_err(|error| error.to_string())?;
        Ok(secrets.into_values().next().unwrap())
    }

    #[test]
    fn finds_the_origin() {
        assert_eq!(
            one("id=x,src=/dev/null"),
            Ok(SecretOrigin::File("/dev/null".into()))
        );
        assert_eq!(one("id=x,env=FOO"), Ok(SecretOrigin::Env("FOO".to_owned())));
        assert_eq!(
            one("type=env,id=x,src=FOO"),
            Ok(SecretOrigin::Env("FOO".to_owned()))
        );
        assert_eq!(one("id=SET"), Ok(SecretOrigin::Env("SET".to_owned())));
    }

    #[test]
    fn refuses_bad_values() {
        assert_eq!(one("src=/dev/null"), Err("secret missing ID".to_owned()));
        assert_eq!(
            one("id"),
            Err("invalid field 'id' must be a key=value pair".to_owned())
        );
        assert_eq!(
            one("id=x,foo=y"),
            Err("unexpected key 'foo' in 'foo=y'".to_owned())
        );
        assert_eq!(
            one("id=x,type=vault"),
            Err("unsupported secret type \"vault\"".to_owned())
        );
        assert!(
            one("id=x,src=/nonexistent")
                .unwrap_err()
                .starts_with("failed to stat /nonexistent: ")
        );
        assert!(
            one("\"id")
                .unwrap_err()
                .starts_with("failed to parse csv secret: ")
        );
    }
}
