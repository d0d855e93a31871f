//! `--debug-json-cache-metrics`: how many steps came from cache.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::format::value::{Value, go_struct};
use crate::progress::Display;
use crate::progress::event::Status;

#[derive(Clone, Debug, Default)]
struct Step {
    name: String,
    cached: bool,
    completed: bool,
    is_from: bool,
}

/// Counts steps as they are told of; clones count together.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    steps: Arc<Mutex<BTreeMap<String, Step>>>,
}

impl Metrics {
    /// Formats the counts, with a line for every step that was not cached.
    pub(super) fn report(&self, took: Duration) -> String {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = String::new();
        let internal = ["[internal]", "[auth]", "importing cache", "exporting "];
        let user: Vec<&Step> = steps
            .values()
            .filter(|step| !internal.iter().any(|prefix| step.name.starts_with(prefix)))
            .collect();
        let missed = user.iter().filter(|step| !step.cached && !step.is_from);
        for step in missed.clone() {
            let _ = writeln!(out, "cache miss: {}", step.name);
        }
        let count = |count: usize| Value::Int(i64::try_from(count).unwrap_or(i64::MAX));
        let from = user.iter().filter(|step| step.is_from).count();
        let value = go_struct! {
            Total "total" = count(steps.len());
            Completed "completed" = count(steps.values().filter(|step| step.completed).count());
            UserTotal "user_total" = count(user.len());
            UserCached "user_cached" = count(user.iter().filter(|step| step.cached).count());
            UserCompleted "user_completed" = count(user.iter().filter(|step| step.completed).count());
            UserCacheable "user_cacheable" = count(user.len() - from);
            From "from" = count(from);
            Miss "miss" = count(missed.count());
            ClientDurationMS "client_duration_ms" = Value::Int(i64::try_from(took.as_millis()).unwrap_or(i64::MAX));
        };
        let _ = writeln!(out, "{}", value.to_json(true));
        out
    }
}

impl Display for Metrics {
    fn update(&mut self, status: Status) -> io::Result<()> {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        for vertex in status.vertexes {
            let step = steps.entry(vertex.digest).or_default();
            if step.name.is_empty() {
                step.name.clone_from(&vertex.name);
            }
            let after_bracket = vertex
                .name
                .strip_prefix('[')
                .and_then(|rest| rest.rsplit_once("] FROM"));
            step.is_from |= after_bracket.is_some();
            step.cached |= vertex.cached;
            step.completed |= vertex.completed.is_some();
        }
        Ok(())
    }

    fn refresh(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::event::Vertex;

    #[test]
    fn counts_steps() {
        let mut metrics = Metrics::default();
        let vertex = |digest: &str, name: &str, cached| Vertex {
            digest: digest.to_owned(),
            name: name.to_owned(),
            cached,
            ..Vertex::default()
        };
        let vertexes = vec![
            vertex("a", "[internal] load x", false),
            vertex("b", "[1/2] FROM x", false),
            vertex("c", "[2/2] RUN y", false),
            vertex("d", "[2/2] RUN z", true),
        ];
        metrics
            .update(Status {
                vertexes,
                ..Status::default()
            })
            .unwrap();
        let report = metrics.report(Duration::from_millis(5));
        assert!(
            report.starts_with("cache miss: [2/2] RUN y\n{\"total\":4,"),
            "{report}"
        );
        assert!(
            report.contains("\"user_cached\":1") && report.contains("\"from\":1,\"miss\":1"),
            "{report}"
        );
    }
}
