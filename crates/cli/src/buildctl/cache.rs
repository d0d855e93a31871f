//! `du` and `prune`.

use api::pb::control::control_client::ControlClient;
use api::pb::control::{DiskUsageRequest, PruneRequest};
use api::transport::MAX_MESSAGE_BYTES;
use tonic::transport::Channel;

use super::args::{DuArgs, PruneArgs};
use super::write_stdout;
use crate::failure::Failure;
use crate::format::template::Template;
use crate::format::time::parse_go_duration;
use crate::format::units;
use crate::format::value::Value;
use crate::records;

/// Prints what the cache holds.
///
/// # Errors
/// When the daemon cannot be asked or the template is bad.
pub async fn du(channel: Channel, args: DuArgs) -> Result<(), Failure> {
    let mut client = ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let request = DiskUsageRequest {
        filter: args.filter.clone(),
        age_limit: 0,
    };
    let response = client
        .disk_usage(request)
        .await
        .map_err(|status| Failure::of_call("failed to call diskusage", &status))?;
    let mut records = response.into_inner().record;
    records.sort_by(|one, other| one.size.cmp(&other.size).then_with(|| one.id.cmp(&other.id)));
    if let Some(format) = args.format.format.filter(|format| !format.is_empty()) {
        let list: Vec<Value> = records.iter().map(records::usage_value).collect();
        let value = if list.is_empty() {
            Value::Null
        } else {
            Value::List(list)
        };
        return write_stdout(&format!("{}\n", Template::parse(&format)?.render(&value)?));
    }
    let mut table = records::table();
    let mut out = String::new();
    if args.verbose {
        records::print_usage_verbose(&mut table, &records);
    } else {
        records::print_usage_heading(&mut table);
        records
            .iter()
            .for_each(|record| records::print_usage_row(&mut table, record));
    }
    out.push_str(&table.take());
    if args.filter.is_empty() {
        records::print_usage_sums(&mut table, &records);
        out.push_str(&table.take());
    }
    write_stdout(&out)
}

/// Removes from the cache and prints what went.
///
/// # Errors
/// When the daemon cannot be asked, fails, or the template is bad.
pub async fn prune(channel: Channel, args: PruneArgs) -> Result<(), Failure> {
    let template = match args.format.format.as_deref().filter(|format| !format.is_empty()) {
        Some(format) => Some(Template::parse(format)?),
        None => None,
    };
    let keep_duration = match &args.keep_duration {
        Some(text) => parse_go_duration(text).map_err(Failure::new)?,
        None => 0,
    };
    let request = PruneRequest {
        filter: args.filter,
        all: args.all,
        keep_duration,
        reserved_space: bytes_of(args.keep_storage_min)?,
        max_used_space: bytes_of(args.keep_storage)?,
        min_free_space: bytes_of(args.free_storage)?,
    };
    let failed = |status: tonic::Status| Failure::of_call("failed to call prune", &status);
    let mut client = ControlClient::new(channel);
    let mut removed = client.prune(request).await.map_err(failed)?.into_inner();
    let mut table = records::table();
    let mut total: i64 = 0;
    let mut first = true;
    while let Some(record) = removed.message().await.map_err(failed)? {
        total = total.saturating_add(record.size);
        if let Some(template) = &template {
            write_stdout(&format!("{}\n", template.render(&records::usage_value(&record))?))?;
            continue;
        }
        if args.verbose {
            records::print_usage_verbose(&mut table, std::slice::from_ref(&record));
        } else {
            if first {
                records::print_usage_heading(&mut table);
            }
            records::print_usage_row(&mut table, &record);
        }
        first = false;
        write_stdout(&table.take())?;
    }
    if template.is_none() {
        table.line(&format!("Total:\t{}", units::two_decimals(total)));
        write_stdout(&table.take())?;
    }
    Ok(())
}

/// Turns megabytes into bytes.
fn bytes_of(megabytes: f64) -> Result<i64, Failure> {
    // Through a text, because a cast would hide what does not fit.
    let rounded = format!("{:.0}", (megabytes * 1e6).trunc());
    rounded
        .parse()
        .map_err(|_| Failure::new(format!("invalid size {megabytes}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn megabytes_are_decimal() {
        assert_eq!(bytes_of(1.5).unwrap(), 1_500_000);
        assert_eq!(bytes_of(0.0).unwrap(), 0);
        assert!(bytes_of(f64::NAN).is_err() && bytes_of(1e300).is_err());
    }
}
