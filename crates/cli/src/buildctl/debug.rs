//! The commands below `debug`, and those about the build history.

use std::fmt::Write as _;
use std::io::Write as _;

use api::pb::content::content_client::ContentClient;
use api::pb::control::control_client::ControlClient;
use api::pb::{content, control};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::args::{ConnectionArgs, CtlArgs, FormatArgs, LogsArgs, MonitorArgs, WorkersArgs};
use super::{open, write_stdout};
use crate::failure::Failure;
use crate::format::table::{Padding, Table};
use crate::format::template::Template;
use crate::format::value::{Value, go_struct};
use crate::{progress, records};

fn template(format: &FormatArgs) -> Result<Option<Template>, Failure> {
    match format.format.as_deref().filter(|format| !format.is_empty()) {
        Some(format) => Ok(Some(Template::parse(format)?)),
        None => Ok(None),
    }
}

/// Prints the daemon's workers.
///
/// # Errors
/// When the daemon cannot be asked or the template is bad.
pub async fn workers(channel: Channel, args: WorkersArgs) -> Result<(), Failure> {
    let request = control::ListWorkersRequest { filter: args.filter };
    let response = ControlClient::new(channel)
        .list_workers(request)
        .await
        .map_err(|status| Failure::of_call("failed to list workers", &status))?;
    let workers = response.into_inner().record;
    if let Some(template) = template(&args.format)? {
        let value = Value::List(workers.iter().map(records::worker_value).collect());
        return write_stdout(&format!("{}\n", template.render(&value)?));
    }
    let mut table = records::table();
    if args.verbose {
        records::print_workers_verbose(&mut table, &workers);
    } else {
        records::print_workers(&mut table, &workers);
    }
    write_stdout(&table.take())
}

/// Prints the daemon's version.
pub(super) async fn info(channel: Channel, format: FormatArgs) -> Result<(), Failure> {
    let response = ControlClient::new(channel)
        .info(control::InfoRequest {})
        .await
        .map_err(|status| Failure::of_call("failed to call info", &status))?;
    let version = response.into_inner().buildkit_version.unwrap_or_default();
    if let Some(template) = template(&format)? {
        let value = go_struct! { BuildkitVersion "buildkitVersion" = records::version_value(&version); };
        return write_stdout(&format!("{}\n", template.render(&value)?));
    }
    let mut table = Table::new(Padding::Spaces);
    records::print_version(&mut table, &version);
    write_stdout(&table.take())
}

/// Shows the progress of a build, also of one that has ended.
pub(super) async fn logs(channel: Channel, args: LogsArgs) -> Result<(), Failure> {
    let failed = |status: tonic::Status| Failure::of_call("failed to get status", &status);
    let display = progress::on_stdout(args.progress.parse()?)?;
    let request = control::StatusRequest { r#ref: args.r#ref };
    let mut stream = ControlClient::new(channel)
        .status(request)
        .await
        .map_err(failed)?
        .into_inner();
    let (sender, receiver) = mpsc::channel(64);
    let read = async move {
        while let Some(response) = stream.message().await.map_err(failed)? {
            if sender.send(response.into()).await.is_err() {
                break;
            }
        }
        Ok::<_, Failure>(())
    };
    let (read, shown) = tokio::join!(read, progress::show(display, receiver));
    read?;
    shown?;
    Ok(())
}

async fn listen(
    client: &mut ControlClient<Channel>,
    request: control::BuildHistoryRequest,
) -> Result<tonic::Streaming<control::BuildHistoryEvent>, Failure> {
    let failed = |status: tonic::Status| Failure::of_call("failed to list histories", &status);
    Ok(client
        .listen_build_history(request)
        .await
        .map_err(failed)?
        .into_inner())
}

fn read_failed(status: &tonic::Status) -> Failure {
    Failure::of_call("failed to read histories", status)
}

/// Prints the builds that the daemon remembers.
///
/// # Errors
/// When the daemon cannot be asked or the template is bad.
pub async fn histories(channel: Channel, format: FormatArgs) -> Result<(), Failure> {
    let template = template(&format)?;
    let mut client = ControlClient::new(channel);
    let request = control::BuildHistoryRequest {
        early_exit: true,
        ..Default::default()
    };
    let mut events = listen(&mut client, request).await?;
    let mut table = records::table();
    table.line("TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\tPINNED");
    while let Some(event) = events.message().await.map_err(|status| read_failed(&status))? {
        if let Some(template) = &template {
            write_stdout(&format!(
                "{}\n",
                template.render(&records::history_value(&event))?
            ))?;
            continue;
        }
        let pinned = if event.record.as_ref().is_some_and(|record| record.pinned) {
            "*"
        } else {
            ""
        };
        table.line(&format!(
            "{}\t{pinned}",
            records::history_cells(&event).join("\t")
        ));
        write_stdout(&table.take())?;
    }
    if template.is_none() {
        write_stdout(&table.take())?;
    }
    Ok(())
}

/// Removes the builds that the daemon remembers, but those that are pinned.
pub(super) async fn prune_histories(channel: Channel, format: FormatArgs) -> Result<(), Failure> {
    let template = template(&format)?;
    let mut client = ControlClient::new(channel);
    let request = control::BuildHistoryRequest {
        early_exit: true,
        ..Default::default()
    };
    let mut events = listen(&mut client, request).await?;
    let mut table = records::table();
    table.line("TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION");
    let mut failures = Vec::new();
    while let Some(event) = events.message().await.map_err(|status| read_failed(&status))? {
        let Some(record) = event.record.as_ref().filter(|record| !record.pinned) else {
            continue;
        };
        let request = control::UpdateBuildHistoryRequest {
            r#ref: record.r#ref.clone(),
            delete: true,
            ..Default::default()
        };
        if let Err(status) = client.update_build_history(request).await {
            failures.push(status.message().to_owned());
            continue;
        }
        match &template {
            Some(template) => write_stdout(&format!(
                "{}\n",
                template.render(&records::history_value(&event))?
            ))?,
            None => {
                table.line(&records::history_cells(&event).join("\t"));
                write_stdout(&table.take())?;
            }
        }
    }
    if template.is_none() {
        write_stdout(&table.take())?;
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(failures.join("\n")))
    }
}

/// Prints builds as they start and end.
pub(super) async fn monitor(channel: Channel, args: MonitorArgs) -> Result<(), Failure> {
    let mut client = ControlClient::new(channel);
    let request = control::BuildHistoryRequest {
        active_only: !args.completed,
        r#ref: args.r#ref.unwrap_or_default(),
        ..Default::default()
    };
    let mut events = listen(&mut client, request).await?;
    while let Some(event) = events.message().await.map_err(|status| read_failed(&status))? {
        let record = event.record.clone().unwrap_or_default();
        let mut text = format!("event: {} ref:{}\n", event.r#type().as_str_name(), record.r#ref);
        if record.num_total_steps != 0 {
            let _ = writeln!(
                text,
                "  cache: {}/{}",
                record.num_cached_steps, record.num_total_steps
            );
        }
        if record.num_warnings != 0 {
            let _ = writeln!(text, "  warnings: {}", record.num_warnings);
        }
        for descriptor in record.result.iter().flat_map(|result| result.results.values()) {
            let _ = writeln!(text, "  descriptor: {}", descriptor.digest);
        }
        write_stdout(&text)?;
    }
    Ok(())
}

/// Pins, unpins or removes a build that the daemon remembers.
pub(super) async fn ctl(connection: &ConnectionArgs, args: CtlArgs) -> Result<(), Failure> {
    let id = args
        .r#ref
        .ok_or_else(|| Failure::new("build ref must be specified"))?;
    if !args.pin && !args.unpin && !args.delete {
        return Err(Failure::new("must specify one of --pin, --unpin, --delete"));
    }
    if args.pin && args.unpin {
        return Err(Failure::new("cannot specify both --pin and --unpin"));
    }
    if args.delete && (args.pin || args.unpin) {
        return Err(Failure::new("cannot specify --delete with --pin or --unpin"));
    }
    let request = control::UpdateBuildHistoryRequest {
        r#ref: id,
        pinned: args.pin,
        delete: args.delete,
        finalize: false,
    };
    let mut client = ControlClient::new(open(connection).await?);
    client
        .update_build_history(request)
        .await
        .map_err(|status| Failure::of_call("failed to update history", &status))?;
    Ok(())
}

/// Writes a blob of the daemon's to standard output.
pub(super) async fn get(connection: &ConnectionArgs, digest: Option<String>) -> Result<(), Failure> {
    let digest = digest.ok_or_else(|| Failure::new("blob digest must be specified"))?;
    digest
        .parse::<oci::Digest>()
        .map_err(|error| Failure::new(format!("{digest}: {error}")))?;
    let failed = |status: tonic::Status| Failure::of_call("failed to read blob", &status);
    let request = content::ReadContentRequest {
        digest,
        ..Default::default()
    };
    let mut pieces = ContentClient::new(open(connection).await?)
        .max_decoding_message_size(api::transport::MAX_MESSAGE_BYTES)
        .read(request)
        .await
        .map_err(failed)?
        .into_inner();
    let mut stdout = std::io::stdout().lock();
    while let Some(piece) = pieces.message().await.map_err(failed)? {
        stdout.write_all(&piece.data)?;
    }
    Ok(stdout.flush()?)
}
