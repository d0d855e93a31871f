//! Triggers that a base image, or a base stage, runs in stages that start from it.

use std::sync::Arc;

use super::Converter;
use super::stages::{Command, StageId};
use crate::error::{ConvertError, Progress, Stop};
use crate::instruction::{Kind, parse_trigger};
use crate::parser;
use crate::position::Range;

impl Converter<'_> {
    /// Puts the triggers of its base in front of a stage's commands; tells whether they need more stages.
    pub(super) fn start_triggers(&mut self, id: StageId) -> Progress<bool> {
        self.inherit(id);
        let mut triggers = std::mem::take(&mut self.stages[id.0].image.config.on_build);
        let stage = &self.stages[id.0];
        if let Some(base) = stage.base.filter(|_| !stage.onbuild_started) {
            let expressions =
                self.stages[base.0]
                    .commands
                    .iter()
                    .filter_map(|command| match &command.instruction.kind {
                        Kind::OnBuild(expression) => Some(expression.clone()),
                        _ => None,
                    });
            triggers.extend(expressions);
            self.stages[id.0].onbuild_started = true;
        }
        if triggers.is_empty() {
            return Ok(false);
        }
        let location = self.stages[id.0].stage.location.clone();
        self.add_triggers(id, &triggers).map_err(|stop| match stop {
            Stop::Pending => Stop::Pending,
            Stop::Failed(error) => Stop::Failed(Box::new(error.only_at(&location))),
        })
    }

    fn add_triggers(&mut self, id: StageId, triggers: &[String]) -> Progress<bool> {
        let location = self.stages[id.0].stage.location.clone();
        let mut commands = Vec::with_capacity(triggers.len());
        let mut grown = false;
        for trigger in triggers {
            let command = self.trigger(trigger, &location)?;
            grown |= !command.sources.is_empty();
            self.depend(id, &command);
            commands.push(command);
        }
        let stage = &mut self.stages[id.0];
        stage.command_total += u64::try_from(commands.len()).unwrap_or(u64::MAX);
        commands.append(&mut stage.commands);
        stage.commands = commands;
        Ok(grown)
    }

    fn trigger(&mut self, trigger: &str, location: &[Range]) -> Progress<Command> {
        let mut nodes = parser::parse(trigger)?.nodes;
        let (Some(mut node), true) = (nodes.pop(), nodes.is_empty()) else {
            return Err(ConvertError::OnBuild.into());
        };
        // Errors and vertices point to the stage that runs the trigger.
        node.start_line = location
            .iter()
            .map(|range| range.start.line)
            .min()
            .unwrap_or_default();
        node.end_line = location
            .iter()
            .map(|range| range.end.line)
            .max()
            .unwrap_or_default();
        let instruction = parse_trigger(&mut node).map_err(|error| Stop::from(error).at(&node.location()))?;
        let mut command = self.command(Arc::new(instruction))?;
        command.is_onbuild = true;
        Ok(command)
    }
}
