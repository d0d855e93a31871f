//! A scan of what a result is made of, run as a step of its own.

use std::collections::BTreeMap;

use llb::{Constraints, ImageOptions, MarshalOptions, Mount, State};
use oci::{ImageConfig, Platform};

use crate::context::Contexts;
use crate::convert::Converted;
use crate::error::{ConvertError, Progress};
use crate::image;
use crate::request::{AttestationOutcome, ImageConfigNeed};

const SOURCE_DIR: &str = "/run/src/";
const OUTPUT_DIR: &str = "/run/out/";
const CORE: &str = "sbom";
const PREDICATE: &str = "https://spdx.dev/Document";

/// A scanner that is ready to run.
pub(crate) struct Scanner {
    reference: String,
    image: ImageConfig,
    platform: Platform,
    parameters: BTreeMap<String, String>,
}

/// Looks the scanner up, if a scan is wanted.
pub(crate) fn scanner(contexts: &Contexts<'_>) -> Progress<Option<Scanner>> {
    let options = contexts.options;
    let Some(sbom) = &options.sbom else {
        return Ok(None);
    };
    let platform = options.build_platform.clone();
    let need = ImageConfigNeed {
        reference: sbom.generator.clone(),
        platform: Some(platform.clone()),
        resolve_mode: options.get("image-resolve-mode").unwrap_or_default().to_owned(),
        log_name: String::new(),
        store: None,
    };
    let answer = contexts.asker.only_image(need)?;
    let image = image::read(&answer.config)?;
    if image.config.entrypoint.is_empty() && image.config.cmd.is_empty() {
        return Err(ConvertError::Scanner(answer.reference.clone()).into());
    }
    let reference = answer.reference.clone();
    Ok(Some(Scanner {
        reference,
        image,
        platform,
        parameters: sbom.parameters.clone(),
    }))
}

impl Scanner {
    /// Makes the step that scans one result.
    pub(crate) fn scan(&self, platform: &str, done: &Converted) -> Progress<AttestationOutcome> {
        let constraints = Constraints::new().platform(&self.platform);
        let scanner = State::image(
            &self.reference,
            ImageOptions {
                constraints,
                ..ImageOptions::default()
            },
        );
        let config = &self.image.config;
        let mut named =
            Constraints::new().custom_name(format!("[{platform}] generating sbom using {}", self.reference));
        if done.ignore_cache {
            named = named.ignore_cache();
        }
        let mut run = scanner
            .run(config.entrypoint.iter().chain(&config.cmd).cloned())
            .constraints(&named);
        run = run.with(|state| self.settings(state, !done.scan_extras.is_empty()));
        run = run.mount(Mount::tmpfs("/tmp", 0));
        run = run.mount(Mount::new(format!("{SOURCE_DIR}core/{CORE}"), &done.state).readonly());
        for (name, state) in &done.scan_extras {
            run = run.mount(Mount::new(format!("{SOURCE_DIR}extras/{CORE}-{name}"), state).readonly());
        }
        let result = run
            .mount(Mount::new(OUTPUT_DIR, &State::scratch()))
            .done()
            .mount(OUTPUT_DIR);
        let definition = match result {
            Some(state) => state.marshal(&MarshalOptions::default())?,
            None => return Err(ConvertError::Scanner(self.reference.clone()).into()),
        };
        let metadata = BTreeMap::from([
            ("reason".to_owned(), b"sbom".to_vec()),
            ("sbom-core".to_owned(), CORE.as_bytes().to_vec()),
        ]);
        Ok(AttestationOutcome {
            definition,
            predicate_type: PREDICATE.to_owned(),
            metadata,
        })
    }

    fn settings(&self, state: &State, has_extras: bool) -> State {
        let mut state = state.dir(&self.image.config.working_dir);
        for variable in &self.image.config.env {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            state = state.env(name, value);
        }
        state = state.env("BUILDKIT_SCAN_DESTINATION", OUTPUT_DIR);
        state = state.env("BUILDKIT_SCAN_SOURCE", &format!("{SOURCE_DIR}core/{CORE}"));
        if has_extras {
            state = state.env("BUILDKIT_SCAN_SOURCE_EXTRAS", &format!("{SOURCE_DIR}extras"));
        }
        for (name, value) in &self.parameters {
            state = state.env(&format!("BUILDKIT_SCAN_{name}"), value);
        }
        state
    }
}
