//! Why steps ran, as the daemon tells it.

use api::pb::explain::explain_client::ExplainClient;
use api::pb::explain::{Change, ExplanationsRequest};
use api::transport::MAX_MESSAGE_BYTES;
use tokio::sync::mpsc;
use tonic::Code;
use tonic::transport::Channel;

use crate::failure::Failure;
use crate::format::time::Instant;
use crate::format::value::{Value, go_struct};
use crate::progress::event::Status;
use crate::records::instant;

/// The reason of directories of clients, which every build looks at.
const CLIENT: &str = "client";

/// Why a vertex ran.
#[derive(Clone, Debug, Default)]
pub struct Explanation {
    /// The vertex's digest.
    pub vertex: String,
    /// The vertex's name.
    pub name: String,
    /// The kind of reason.
    pub reason: String,
    /// The reason in words.
    pub text: String,
    /// When that ran which it is compared with.
    pub compared_at: Option<Instant>,
    /// What differs from that.
    pub changes: Vec<Change>,
    /// How many further differences there are.
    pub omitted: i64,
}

impl From<api::pb::explain::Explanation> for Explanation {
    fn from(message: api::pb::explain::Explanation) -> Self {
        Self {
            vertex: message.vertex,
            name: message.name,
            reason: message.reason,
            text: message.text,
            compared_at: message.compared_at.as_ref().map(instant),
            changes: message.changes,
            omitted: message.omitted,
        }
    }
}

impl Explanation {
    /// Turns it into the value that is printed as JSON.
    pub fn to_value(&self) -> Value {
        let changes: Vec<Value> = self.changes.iter().map(change_value).collect();
        go_struct! {
            Vertex "vertex" = Value::text(&self.vertex);
            Name "name" = Value::text(&self.name);
            Reason "reason" = Value::text(&self.reason);
            Text "text" = Value::text(&self.text);
            ComparedAt "comparedAt" ?empty = Value::option(self.compared_at, Value::Time);
            Changes "changes" ?empty = Value::List(changes);
            Omitted "omitted" ?empty = Value::Int(self.omitted);
        }
    }
}

fn change_value(change: &Change) -> Value {
    go_struct! {
        Kind "kind" = Value::text(&change.kind);
        Subject "subject" = Value::text(&change.subject);
        Attribute "attribute" ?empty = Value::text(&change.attribute);
        How "how" = Value::text(&change.how);
        Before "before" ?empty = Value::option(change.before.as_ref(), Value::text);
        After "after" ?empty = Value::option(change.after.as_ref(), Value::text);
        Input "input" ?empty = Value::text(&change.input);
        Text "text" = Value::text(&change.text);
    }
}

/// Tells why steps ran: a line a step, and below it one for each difference.
pub fn to_text(explanations: &[Explanation]) -> String {
    let mut text = String::new();
    let steps = explanations.iter().filter(|found| found.reason != CLIENT);
    for Explanation {
        name,
        text: reason,
        changes,
        omitted,
        ..
    } in steps
    {
        text.push_str(&format!("{}\n", line(name)));
        for change in changes {
            text.push_str(&format!("  {}\n", line(&change.text)));
        }
        if changes.is_empty() {
            text.push_str(&format!("  {}\n", line(reason)));
        }
        if *omitted > 0 {
            text.push_str(&format!("  and {omitted} more\n"));
        }
    }
    if text.is_empty() {
        "No step ran: all of them were in the cache.\n".clone_into(&mut text);
    }
    text
}

/// What comes from elsewhere must not steer a terminal.
fn line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).collect()
}

fn client(channel: Channel) -> ExplainClient<Channel> {
    ExplainClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

fn failed(status: &tonic::Status) -> Failure {
    match status.code() {
        Code::Unimplemented => Failure::new("the daemon does not tell why steps run; cooperd does"),
        _ => Failure::of_call("failed to explain", status),
    }
}

/// Asks for the explanations of a build that has ended or runs; returns its name with them.
///
/// # Errors
/// When there is no such build, or the daemon cannot tell.
pub async fn read(channel: Channel, build: String) -> Result<(String, Vec<Explanation>), Failure> {
    let request = ExplanationsRequest {
        r#ref: build,
        wait: false,
    };
    let mut answers = client(channel)
        .explanations(request)
        .await
        .map_err(|status| failed(&status))?
        .into_inner();
    let (mut id, mut found) = (String::new(), Vec::new());
    while let Some(answer) = answers.message().await.map_err(|status| failed(&status))? {
        id = answer.r#ref;
        found.extend(answer.explanations.into_iter().map(Explanation::from));
    }
    Ok((id, found))
}

/// Passes on the explanations of a build that is about to run, until it ends.
///
/// # Errors
/// When the daemon cannot tell.
pub async fn follow(channel: Channel, build: String, events: mpsc::Sender<Status>) -> Result<(), Failure> {
    let request = ExplanationsRequest {
        r#ref: build,
        wait: true,
    };
    let mut answers = client(channel)
        .explanations(request)
        .await
        .map_err(|status| failed(&status))?
        .into_inner();
    while let Some(answer) = answers.message().await.map_err(|status| failed(&status))? {
        let explanations: Vec<_> = answer.explanations.into_iter().map(Explanation::from).collect();
        if explanations.is_empty() {
            continue;
        }
        let status = Status {
            explanations,
            ..Status::default()
        };
        // Without a display nobody wants to know.
        let _ = events.send(status).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explanation(name: &str, reason: &str, changes: &[&str]) -> Explanation {
        let change = |text: &&str| Change {
            kind: "environment".to_owned(),
            subject: "environment variable A".to_owned(),
            how: "changed".to_owned(),
            before: Some("1".to_owned()),
            text: (*text).to_owned(),
            ..Change::default()
        };
        Explanation {
            vertex: "sha256:1".to_owned(),
            name: name.to_owned(),
            reason: reason.to_owned(),
            text: "in words".to_owned(),
            changes: changes.iter().map(change).collect(),
            ..Explanation::default()
        }
    }

    #[test]
    fn steps_are_told_with_what_differs() {
        let mut more = explanation("[2/3] RUN a\u{1b}[2J", "changed", &["one", "two"]);
        more.omitted = 3;
        let told = to_text(&[
            explanation("[internal] load build context", "client", &[]),
            more,
            explanation("[3/3] RUN b", "never-built", &[]),
        ]);
        assert_eq!(
            told,
            "[2/3] RUN a [2J\n  one\n  two\n  and 3 more\n[3/3] RUN b\n  in words\n"
        );
        let nothing = to_text(&[explanation("[internal] load build context", "client", &[])]);
        assert!(nothing.starts_with("No step ran"));
    }

    #[test]
    fn programs_get_json() {
        let json = explanation("RUN a", "changed", &["one"])
            .to_value()
            .to_json(false);
        assert_eq!(
            json,
            r#"{"vertex":"sha256:1","name":"RUN a","reason":"changed","text":"in words","changes":[{"kind":"environment","subject":"environment variable A","how":"changed","before":"1","text":"one"}]}"#
        );
    }
}
