//! Base images of stages.

use std::collections::BTreeSet;
use std::rc::Rc;

use llb::{Constraints, ImageOptions, State};
use oci::{ImageConfig, Platform, Reference};

use super::stages::StageId;
use super::{Converter, SCRATCH, validate, wire_ranges};
use crate::context::NamedContext;
use crate::error::{ConvertError, Progress, Stop};
use crate::image;
use crate::request::ImageConfigNeed;
use crate::word::NoVariables;
use crate::{raw, suggest};

/// Repositories that people often mean.
const COMMON_IMAGES: [&str; 7] = [
    "alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora",
];

impl Converter<'_> {
    /// Resolves what the target needs. Triggers of base images may add to that.
    pub(super) fn resolve_stages(&mut self, target: StageId) -> Progress<BTreeSet<StageId>> {
        loop {
            let reachable = self.reachable(target);
            self.resolve_bases(&reachable)?;
            let mut grown = false;
            for id in &reachable {
                grown |= self.start_triggers(*id)?;
            }
            if !grown {
                return Ok(reachable);
            }
        }
    }

    fn resolve_bases(&mut self, reachable: &BTreeSet<StageId>) -> Progress<()> {
        let mut pending = false;
        let mut failed = None;
        for id in self.order.clone() {
            let stage = &mut self.stages[id.0];
            if stage.base.is_some() || stage.dispatched || stage.resolved {
                continue;
            }
            let is_reachable = self.all_stages || reachable.contains(&id);
            stage.resolved = is_reachable;
            if stage.stage.base_name == SCRATCH && stage.named.is_none() {
                stage.state = State::scratch();
                stage.image = image::empty(&self.platforms.target);
                stage.platform = Some(self.platforms.target.clone());
                stage.dispatched |= stage.unregistered;
                continue;
            }
            match self.resolve_base(id, is_reachable) {
                Ok(()) => {}
                // The others may ask at the same time.
                Err(Stop::Pending) => pending = true,
                // The others may still have warnings.
                Err(stop) => {
                    let stop = stop.at(&self.stages[id.0].stage.location);
                    failed.get_or_insert(stop);
                }
            }
            let stage = &mut self.stages[id.0];
            stage.dispatched |= stage.unregistered;
        }
        match failed {
            Some(stop) => Err(stop),
            None if pending => Err(Stop::Pending),
            None => Ok(()),
        }
    }

    fn resolve_base(&mut self, id: StageId, is_reachable: bool) -> Progress<()> {
        let stage = &mut self.stages[id.0];
        let written = stage.stage.base_name.clone();
        let reference = Reference::parse(&written).map_err(|error| {
            ConvertError::Reference(error).context(format!(
                "failed to parse stage name {}",
                crate::text::quote(&written)
            ))
        })?;
        let mut platform = stage
            .platform
            .clone()
            .unwrap_or_else(|| self.platforms.target.clone());
        stage.stage.base_name = reference.clone().with_default_tag().to_string();
        let mut is_scratch = false;
        if is_reachable {
            if let Some(named) = stage.named.clone() {
                return self.load_stage(id, &named);
            }
            let base_name = self.stages[id.0].stage.base_name.clone();
            if let Some(named) = self.named_context(&base_name, Some(&platform))? {
                return self.load_base(id, &named, platform);
            }
            is_scratch = self.resolve_image(id, &written, reference, &mut platform)?;
        }
        let state = if is_scratch {
            State::scratch()
        } else {
            self.image_state(id, &platform)
        };
        if is_reachable && !is_scratch {
            let stage = &self.stages[id.0];
            let (actual, location) = (stage.image.platform(), &stage.stage.location);
            validate::base_image_platform(&written, &platform, &actual, location, &self.linter);
        }
        let stage = &mut self.stages[id.0];
        stage.state = state;
        stage.platform = Some(platform);
        Ok(())
    }

    /// Replaces a whole stage by a named context.
    fn load_stage(&mut self, id: StageId, named: &NamedContext) -> Progress<()> {
        let paths = Rc::clone(&self.stages[id.0].paths);
        let loaded = self.contexts.load(named, &mut self.locals, Some(paths))?;
        let stage = &mut self.stages[id.0];
        stage.dispatched = true;
        stage.env = env_of(&loaded.state);
        stage.state = loaded.state;
        if let Some(image) = loaded.image {
            if !image.architecture.is_empty() && !image.os.is_empty() {
                stage.platform = Some(image.platform());
            }
            self.set_image(id, image);
        } else {
            stage.image.rootfs.kind.clear();
        }
        Ok(())
    }

    /// Replaces a base image by a named context.
    fn load_base(&mut self, id: StageId, named: &NamedContext, platform: Platform) -> Progress<()> {
        let paths = Rc::clone(&self.stages[id.0].paths);
        let loaded = self.contexts.load(named, &mut self.locals, Some(paths))?;
        let image = loaded.image.unwrap_or_else(|| image::empty(&platform));
        let stage = &mut self.stages[id.0];
        stage.base_image = Some(image.clone());
        stage.env = env_of(&loaded.state);
        stage.state = loaded.state.platform(&platform);
        stage.platform = Some(platform);
        self.set_image(id, image);
        Ok(())
    }

    /// Begins with an image; its history is kept apart.
    fn set_image(&mut self, id: StageId, mut image: ImageConfig) {
        image.created = None;
        let stage = &mut self.stages[id.0];
        stage.history = std::mem::take(&mut image.history);
        stage.image = image;
    }

    /// Asks for the base image; tells whether it is empty.
    fn resolve_image(
        &mut self,
        id: StageId,
        written: &str,
        mut reference: Reference,
        platform: &mut Platform,
    ) -> Progress<bool> {
        let options = self.contexts.options;
        let base_name = self.stages[id.0].stage.base_name.clone();
        let shown = if options.multi_platform {
            format!("{} ", platform.format_all())
        } else {
            String::new()
        };
        let need = ImageConfigNeed {
            reference: base_name.clone(),
            platform: Some(platform.clone()),
            resolve_mode: options.resolve_mode.as_str().to_owned(),
            log_name: format!("[{shown}internal] load metadata for {base_name}"),
            store: None,
        };
        let answer = self.contexts.asker.only_image(need);
        let answer = answer.map_err(|stop| self.suggest_image(stop, written))?;
        if reference.to_string() != answer.reference {
            reference = Reference::parse(&answer.reference).map_err(|error| {
                let shown = crate::text::quote(&answer.reference);
                ConvertError::Reference(error).context(format!("failed to parse ref {shown}"))
            })?;
        }
        let image =
            image::read(&answer.config).map_err(|stop| stop.context("failed to parse image config"))?;
        let stage = &mut self.stages[id.0];
        stage.base_image = Some(image.clone());
        if stage.platform.is_none() && self.platforms.implicit {
            let build = &self.platforms.build;
            let fits =
                |platform: &Platform| platform.os == image.os && platform.architecture == image.architecture;
            if !fits(platform) && fits(build) {
                *platform = build.clone();
            }
        }
        if let Some(digest) = answer.digest {
            reference = reference.with_digest(digest);
        }
        stage.stage.base_name = reference.to_string();
        let is_scratch =
            image.rootfs.diff_ids.is_empty() && image.history.iter().all(|history| history.empty_layer);
        self.set_image(id, image);
        Ok(is_scratch)
    }

    fn suggest_image(&self, stop: Stop, written: &str) -> Stop {
        let Stop::Failed(error) = stop else { return stop };
        let mut names = self.stage_names();
        for name in COMMON_IMAGES {
            let forms = [
                name.to_owned(),
                format!("docker.io/library{name}"),
                format!("{name}:latest"),
            ];
            names.extend(forms);
        }
        Stop::Failed(Box::new(
            error
                .context(written)
                .suggest(suggest::search(written, names, false)),
        ))
    }

    fn image_state(&mut self, id: StageId, platform: &Platform) -> State {
        let options = self.contexts.options;
        let base_name = self.stages[id.0].stage.base_name.clone();
        let text = format!("FROM {base_name}");
        let name = self.step_name(id, &text, options.multi_platform, Some(platform), &NoVariables);
        let stage = &self.stages[id.0].stage;
        let constraints = Constraints::new()
            .description([("com.docker.dockerfile.v1.command", raw::shown(stage.code.clone()))])
            .platform(platform)
            .custom_name(name)
            .location(self.source_map, wire_ranges(&stage.location));
        State::image(
            &base_name,
            ImageOptions {
                resolve_mode: options.resolve_mode,
                constraints,
                ..ImageOptions::default()
            },
        )
    }
}

/// Takes over the variables that a state already has.
fn env_of(state: &State) -> crate::env::Env {
    let mut env = crate::env::Env::default();
    for (name, value) in state.get_env() {
        env.set(name, value);
    }
    env
}
