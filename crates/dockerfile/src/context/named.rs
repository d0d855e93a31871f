//! Named contexts: what replaces a stage or an image by something else.

use std::collections::BTreeMap;

use base64::Engine as _;
use llb::{Constraints, HttpOptions, ImageOptions, LocalOptions, OciLayoutOptions, State};
use oci::{ImageConfig, Platform, Reference};

use super::{Contexts, DOCKERIGNORE, HTTP_FILE, Paths, PendingLocal, git_context};
use crate::error::{ConvertError, Progress, Stop};
use crate::git_ref::GitRef;
use crate::image;
use crate::request::{ImageConfigNeed, LayoutStore};
use crate::text;

/// How often a source policy may turn a context into another one.
const MAX_REDIRECTS: usize = 10;

/// A named context that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct NamedContext {
    input: String,
    name: String,
    name_with_platform: String,
    platform: Option<Platform>,
    resolve_mode: String,
}

/// What a named context is.
pub(crate) struct Loaded {
    pub(crate) state: State,
    pub(crate) image: Option<ImageConfig>,
}

impl Contexts<'_> {
    /// Looks for a named context, first one for the platform.
    pub(crate) fn named(
        &self,
        name: &str,
        platform: Option<&Platform>,
        resolve_mode: &str,
    ) -> Progress<Option<NamedContext>> {
        let reference = Reference::parse(name).map_err(|error| {
            Stop::from(ConvertError::Reference(error).context(format!("invalid context name {name}")))
        })?;
        let familiar = reference.familiar();
        let name = familiar.strip_suffix(":latest").unwrap_or(&familiar);
        let shown = platform.cloned().unwrap_or_else(Platform::host).normalized();
        let with_platform = format!("{name}::{}", shown.format_all());
        let found = [with_platform.as_str(), name]
            .into_iter()
            .find_map(|name_with_platform| {
                let input = self
                    .options
                    .get(&format!("context:{name_with_platform}"))?
                    .to_owned();
                Some(NamedContext {
                    input,
                    name: name.to_owned(),
                    name_with_platform: name_with_platform.to_owned(),
                    platform: platform.cloned(),
                    resolve_mode: resolve_mode.to_owned(),
                })
            });
        Ok(found)
    }

    /// Loads a named context. `locals` gets what is to be decided at the end, with the paths used of it.
    pub(crate) fn load(
        &self,
        context: &NamedContext,
        locals: &mut Vec<PendingLocal>,
        paths: Option<Paths>,
    ) -> Progress<Loaded> {
        let mut context = context.clone();
        for _ in 0..=MAX_REDIRECTS {
            let (kind, rest) = context
                .input
                .split_once(':')
                .ok_or_else(|| ConvertError::ContextForm {
                    input: context.input.clone(),
                    name: context.name_with_platform.clone(),
                })?;
            let kind = if kind.starts_with("git@") { "git" } else { kind };
            let loaded = match kind {
                "docker-image" => match self.load_image(&context, rest)? {
                    Ok(loaded) => loaded,
                    Err(input) => {
                        context.input = input;
                        continue;
                    }
                },
                "git" => match GitRef::parse(&context.input) {
                    Some(found) => plain(git_context(&context.input, &found?, self.options, false)),
                    None => return Err(ConvertError::GitContext(context.input).into()),
                },
                "http" | "https" => self.load_http(&context)?,
                "oci-layout" => self.load_layout(&context, rest)?,
                "local" => self.load_local(&context, rest, locals, paths)?,
                "input" => self.load_input(&context, rest)?,
                _ => {
                    let (kind, name) = (kind.to_owned(), context.name_with_platform);
                    return Err(ConvertError::ContextKind { kind, name }.into());
                }
            };
            return Ok(loaded);
        }
        Err(ConvertError::ContextRecursion(context.input).into())
    }

    fn load_image(&self, context: &NamedContext, rest: &str) -> Progress<Result<Loaded, String>> {
        let written = rest.strip_prefix("//").unwrap_or(rest);
        if written == "scratch" {
            return Ok(Ok(plain(State::scratch())));
        }
        let name = &context.name_with_platform;
        let need = ImageConfigNeed {
            reference: Reference::parse(written)?.with_default_tag().to_string(),
            platform: context.platform.clone(),
            resolve_mode: context.resolve_mode.clone(),
            log_name: format!("[context {name}] load metadata for {written}"),
            store: None,
        };
        let answer = match self.asker.image(need)? {
            Ok(answer) => answer,
            Err(updated) => {
                let (kind, rest) = updated
                    .split_once("://")
                    .ok_or_else(|| ConvertError::Redirect(updated.to_owned()))?;
                return Ok(Err(format!("{kind}:{rest}")));
            }
        };
        let mut constraints = Constraints::new().custom_name(format!("[context {name}] {written}"));
        constraints.platform.clone_from(&context.platform);
        let state = State::image(
            &answer.reference,
            ImageOptions {
                constraints,
                ..ImageOptions::default()
            },
        );
        with_config(&state, &answer.config).map(Ok)
    }

    fn load_http(&self, context: &NamedContext) -> Progress<Loaded> {
        if let Some(found) = GitRef::parse(&context.input) {
            return Ok(plain(git_context(&context.input, &found?, self.options, false)));
        }
        let name = format!("[context {}] {}", context.name_with_platform, context.input);
        Ok(plain(State::http(
            &context.input,
            HttpOptions {
                filename: HTTP_FILE.to_owned(),
                constraints: Constraints::new().custom_name(name),
                ..HttpOptions::default()
            },
        )))
    }

    fn load_layout(&self, context: &NamedContext, rest: &str) -> Progress<Loaded> {
        let written = rest.strip_prefix("//").unwrap_or(rest);
        let layout = Reference::parse_exact(written).map_err(|error| {
            let shown = text::quote(written);
            ConvertError::Reference(error).context(format!("could not parse oci-layout reference {shown}"))
        })?;
        let no_digest = || ConvertError::LayoutDigest(written.to_owned());
        let digest = *layout.digest().ok_or_else(no_digest)?;
        let store_id = layout.name();
        let reference = Reference::parse(&context.name)?.with_digest(digest).to_string();
        let session_id = self.options.session_id.clone();
        let shown = &context.name_with_platform;
        let need = ImageConfigNeed {
            reference: reference.clone(),
            platform: context.platform.clone(),
            resolve_mode: String::new(),
            log_name: format!("[context {shown}] load metadata for {reference}"),
            store: Some(LayoutStore {
                session_id: session_id.clone(),
                store_id: store_id.clone(),
            }),
        };
        let answer = self.asker.only_image(need)?;
        let mut constraints =
            Constraints::new().custom_name(format!("[context {shown}] OCI load from client"));
        constraints.platform.clone_from(&context.platform);
        let options = OciLayoutOptions {
            session_id,
            store_id,
            layer_limit: None,
            constraints,
        };
        let mut loaded = with_config(&State::oci_layout(&reference, options), &answer.config)?;
        loaded.image = Some(image::read(&answer.config)?);
        Ok(loaded)
    }

    fn load_local(
        &self,
        context: &NamedContext,
        name: &str,
        locals: &mut Vec<PendingLocal>,
        paths: Option<Paths>,
    ) -> Progress<Loaded> {
        let shown = &context.name_with_platform;
        let session_id = self.options.session_of(name);
        let ignore = State::local(
            name,
            LocalOptions {
                session_id: session_id.clone(),
                follow_paths: vec![DOCKERIGNORE.to_owned()],
                shared_key_hint: format!("context:{shown}-{DOCKERIGNORE}"),
                differ: llb::attr::LOCAL_DIFFER_NONE.to_owned(),
                constraints: Constraints::new().custom_name(format!("[context {shown}] load {DOCKERIGNORE}")),
                ..LocalOptions::default()
            },
        );
        let exclude_patterns = self.read_ignore(&ignore)?;
        let shared_key = self
            .options
            .get(&format!("sharedkey:localdir:{shown}"))
            .unwrap_or_default();
        let (state, slot) = State::deferred();
        let options = LocalOptions {
            session_id,
            exclude_patterns,
            shared_key_hint: format!("context:{shown}-{shared_key}"),
            constraints: Constraints::new().custom_name(format!("[context {shown}] load from client")),
            ..LocalOptions::default()
        };
        locals.push(PendingLocal {
            slot,
            name: name.to_owned(),
            options,
            paths,
        });
        Ok(plain(state))
    }

    fn load_input(&self, context: &NamedContext, input: &str) -> Progress<Loaded> {
        let definition = self.inputs.get(input).ok_or_else(|| ConvertError::Input {
            input: input.to_owned(),
            name: context.name_with_platform.clone(),
        })?;
        let state = State::from_definition(definition)?;
        let Some(metadata) = self.options.get(&format!("input-metadata:{input}")) else {
            return Ok(plain(state));
        };
        let parsed = input_metadata(metadata).map_err(|error| {
            ConvertError::Json(error).context(format!("failed to parse input metadata {metadata}"))
        })?;
        let Some(config) = parsed.get("containerimage.config") else {
            return Ok(plain(state));
        };
        let mut loaded = with_config(&state, config)?;
        loaded.image = Some(image::read(config)?);
        Ok(loaded)
    }
}

/// Reads what is known of an input: a JSON object whose values are in base64. The error is Go's text where it is known.
fn input_metadata(json: &str) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let parsed: BTreeMap<String, String> = serde_json::from_str(json).map_err(|error| {
        if error.is_eof() {
            "unexpected end of JSON input".to_owned()
        } else {
            error.to_string()
        }
    })?;
    let decode = |(key, value): (String, String)| {
        let decoded = base64::engine::general_purpose::STANDARD.decode(&value);
        let bytes = decoded.map_err(|error| {
            let at = match error {
                base64::DecodeError::InvalidByte(at, _) => at,
                _ => value.len(),
            };
            format!("illegal base64 data at input byte {at}")
        })?;
        Ok((key, bytes))
    };
    parsed.into_iter().map(decode).collect()
}

fn plain(state: State) -> Loaded {
    Loaded { state, image: None }
}

fn with_config(state: &State, config: &[u8]) -> Progress<Loaded> {
    let mut image = image::read(config)?;
    image.created = None;
    Ok(Loaded {
        state: state.image_config(&image),
        image: Some(image),
    })
}
