//! Prints what daemons tell of themselves: cache records, workers, versions, builds.

use std::collections::BTreeMap;

use api::pb::{control, worker};

use crate::format::table::{Padding, Table};
use crate::format::time::{Instant, go_duration};
use crate::format::units;
use crate::format::value::{Value, go_struct};

/// Turns protobuf's timestamp into an instant.
pub fn instant(at: &prost_types::Timestamp) -> Instant {
    Instant::from_parts(at.seconds, at.nanos)
}

/// Turns a cache record into the value that templates see.
pub fn usage_value(record: &control::UsageRecord) -> Value {
    let created = record.created_at.as_ref().map(instant).unwrap_or_default();
    go_struct! {
        ID "id" = Value::text(&record.id);
        Mutable "mutable" = Value::Bool(record.mutable);
        InUse "inUse" = Value::Bool(record.in_use);
        Size "size" = Value::Int(record.size);
        CreatedAt "createdAt" = Value::Time(created);
        LastUsedAt "lastUsedAt" = Value::option(record.last_used_at.as_ref(), |at| Value::Time(instant(at)));
        UsageCount "usageCount" = Value::Int(record.usage_count);
        Parents "parents" = Value::texts(record.parents.iter().map(String::as_str));
        Description "description" = Value::text(&record.description);
        RecordType "recordType" = Value::text(&record.record_type);
        Shared "shared" = Value::Bool(record.shared);
    }
}

/// Prints cache records with everything that is known.
pub fn print_usage_verbose(table: &mut Table, records: &[control::UsageRecord]) {
    for record in records {
        let mut entry = |key: &str, value: &str| table.line(&format!("{key}:\t{value}"));
        entry("ID", &record.id);
        if !record.parents.is_empty() {
            entry("Parents", &record.parents.join(";"));
        }
        let created = record.created_at.as_ref().map(instant).unwrap_or_default();
        entry("Created at", &created.go_string());
        entry("Mutable", &record.mutable.to_string());
        entry("Reclaimable", &(!record.in_use).to_string());
        entry("Shared", &record.shared.to_string());
        entry("Size", &units::two_decimals(record.size));
        if !record.description.is_empty() {
            entry("Description", &record.description);
        }
        entry("Usage count", &record.usage_count.to_string());
        if let Some(at) = &record.last_used_at {
            entry("Last used", &instant(at).go_string());
        }
        if !record.record_type.is_empty() {
            entry("Type", &record.record_type);
        }
        table.line("");
    }
}

/// Prints the heading of a table of cache records.
pub fn print_usage_heading(table: &mut Table) {
    table.line("ID\tRECLAIMABLE\tSIZE\tLAST ACCESSED");
}

/// Prints a row of a table of cache records.
pub fn print_usage_row(table: &mut Table, record: &control::UsageRecord) {
    let id = if record.mutable {
        format!("{}*", record.id)
    } else {
        record.id.clone()
    };
    let size = units::two_decimals(record.size);
    let size = if record.shared { format!("{size}*") } else { size };
    table.line(&format!("{id:<71}\t{:<11}\t{size}\t", !record.in_use));
}

/// Prints sums of cache records.
pub fn print_usage_sums(table: &mut Table, records: &[control::UsageRecord]) {
    let sum = |chosen: fn(&control::UsageRecord) -> bool| -> i64 {
        records
            .iter()
            .filter(|record| chosen(record))
            .map(|record| record.size)
            .fold(0, i64::saturating_add)
    };
    let total = sum(|record| record.size > 0);
    let reclaimable = sum(|record| record.size > 0 && !record.in_use);
    let shared = sum(|record| record.shared);
    if shared > 0 {
        table.line(&format!("Shared:\t{}", units::two_decimals(shared)));
        table.line(&format!("Private:\t{}", units::two_decimals(total - shared)));
    }
    table.line(&format!("Reclaimable:\t{}", units::two_decimals(reclaimable)));
    table.line(&format!("Total:\t{}", units::two_decimals(total)));
}

fn platform_name(platform: &llb::pb::Platform) -> String {
    let parts = [&platform.os, &platform.architecture, &platform.variant];
    parts
        .into_iter()
        .filter(|part| !part.is_empty())
        .cloned()
        .collect::<Vec<_>>()
        .join("/")
}

fn platform_names(worker: &worker::WorkerRecord) -> String {
    worker
        .platforms
        .iter()
        .map(platform_name)
        .collect::<Vec<_>>()
        .join(",")
}

/// Turns a version into the value that templates see.
pub fn version_value(version: &worker::BuildkitVersion) -> Value {
    go_struct! {
        Package "package" = Value::text(&version.package);
        Version "version" = Value::text(&version.version);
        Revision "revision" = Value::text(&version.revision);
        DockerfileVersion "dockerfileVersion" ?empty = Value::text(&version.dockerfile_version);
    }
}

/// Turns a worker into the value that templates see.
pub fn worker_value(worker: &worker::WorkerRecord) -> Value {
    let platforms = worker.platforms.iter().map(|platform| {
        go_struct! {
            Architecture "architecture" = Value::text(&platform.architecture);
            OS "os" = Value::text(&platform.os);
            OSVersion "os.version" ?empty = Value::text(&platform.os_version);
            OSFeatures "os.features" ?empty = Value::texts(platform.os_features.iter().map(String::as_str));
            Variant "variant" ?empty = Value::text(&platform.variant);
        }
    });
    let rules = worker.gc_policy.iter().map(|rule| {
        go_struct! {
            All "all" = Value::Bool(rule.all);
            Filter "filter" = Value::texts(rule.filters.iter().map(String::as_str));
            KeepDuration "keepDuration" = Value::Duration(rule.keep_duration);
            ReservedSpace "reservedSpace" = Value::Int(rule.reserved_space);
            MaxUsedSpace "maxUsedSpace" = Value::Int(rule.max_used_space);
            MinFreeSpace "minFreeSpace" = Value::Int(rule.min_free_space);
        }
    });
    let devices: Vec<Value> = worker.cdi_devices.iter().map(device_value).collect();
    let version = worker.buildkit_version.clone().unwrap_or_default();
    go_struct! {
        ID "id" = Value::text(&worker.id);
        Labels "labels" = Value::text_map(worker.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        Platforms "platforms" = Value::List(platforms.collect());
        GCPolicy "gcPolicy" = Value::List(rules.collect());
        BuildkitVersion "buildkitVersion" = version_value(&version);
        CDIDevices "cdiDevices" = if devices.is_empty() { Value::Null } else { Value::List(devices) };
    }
}

fn device_value(device: &worker::CdiDevice) -> Value {
    let annotations = device
        .annotations
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    go_struct! {
        Name "name" = Value::text(&device.name);
        AutoAllow "autoAllow" = Value::Bool(device.auto_allow);
        Annotations "annotations" = Value::text_map(annotations);
        OnDemand "onDemand" = Value::Bool(device.on_demand);
    }
}

/// Prints workers as a table.
pub fn print_workers(table: &mut Table, workers: &[worker::WorkerRecord]) {
    table.line("ID\tPLATFORMS");
    for worker in workers {
        table.line(&format!("{}\t{}", worker.id, platform_names(worker)));
    }
}

/// Prints workers with everything that is known.
pub fn print_workers_verbose(table: &mut Table, workers: &[worker::WorkerRecord]) {
    for worker in workers {
        table.line(&format!("ID:\t{}", worker.id));
        table.line(&format!("Platforms:\t{}", platform_names(worker)));
        let version = worker.buildkit_version.clone().unwrap_or_default();
        print_version(table, &version);
        table.line("Labels:");
        for (name, value) in &worker.labels {
            table.line(&format!("\t{name}:\t{value}"));
        }
        if !worker.cdi_devices.is_empty() {
            table.line("Devices:");
            worker
                .cdi_devices
                .iter()
                .for_each(|device| print_device(table, device));
            table.line("");
        }
        for (index, rule) in worker.gc_policy.iter().enumerate() {
            print_rule(table, index, rule);
        }
        table.line("");
    }
}

fn print_device(table: &mut Table, device: &worker::CdiDevice) {
    table.line(&format!("\tName:\t{}", device.name));
    if device.on_demand {
        table.line("\tOnDemand:\ttrue");
    } else {
        table.line(&format!("\tAutoAllow:\t{}", device.auto_allow));
    }
    for (name, value) in &device.annotations {
        table.line(&format!("\tAnnotations:\t{name}:\t{value}"));
    }
}

fn print_rule(table: &mut Table, index: usize, rule: &worker::GcPolicy) {
    table.line(&format!("GC Policy rule#{index}:"));
    table.line(&format!("\tAll:\t{}", rule.all));
    if !rule.filters.is_empty() {
        table.line(&format!("\tFilters:\t{}", rule.filters.join(" ")));
    }
    if rule.keep_duration > 0 {
        table.line(&format!("\tKeep duration:\t{}", go_duration(rule.keep_duration)));
    }
    let spaces = [
        ("Reserved space", rule.reserved_space),
        ("Minimum free space", rule.min_free_space),
        ("Maximum used space", rule.max_used_space),
    ];
    for (name, bytes) in spaces.into_iter().filter(|(_, bytes)| *bytes > 0) {
        table.line(&format!("\t{name}:\t{}", units::shortest(bytes)));
    }
}

/// Prints a version.
pub fn print_version(table: &mut Table, version: &worker::BuildkitVersion) {
    table.line(&format!(
        "BuildKit:\t{} {} {}",
        version.package, version.version, version.revision
    ));
    if !version.dockerfile_version.is_empty() {
        table.line(&format!("Dockerfile:\t{}", version.dockerfile_version));
    }
}

/// Turns an event of the history into the value that templates see.
pub fn history_value(event: &control::BuildHistoryEvent) -> Value {
    let record = event.record.as_ref();
    go_struct! {
        Type "type" ?empty = Value::Int(i64::from(event.r#type));
        Record "record" ?empty = Value::option(record, |record| go_struct! {
            Ref "Ref" ?empty = Value::text(&record.r#ref);
            Frontend "Frontend" ?empty = Value::text(&record.frontend);
            FrontendAttrs "FrontendAttrs" ?empty =
                Value::text_map(record.frontend_attrs.iter().map(|(name, value)| (name.as_str(), value.as_str())));
            Exporters "Exporters" ?empty = list(&record.exporters, exporter_value);
            Error "error" ?empty = Value::option(record.error.as_ref(), |error| go_struct! {
                Code "code" ?empty = Value::Int(i64::from(error.code));
                Message "message" ?empty = Value::text(&error.message);
            });
            CreatedAt "CreatedAt" ?empty = Value::option(record.created_at.as_ref(), timestamp_value);
            CompletedAt "CompletedAt" ?empty = Value::option(record.completed_at.as_ref(), timestamp_value);
            Logs "logs" ?empty = Value::option(record.logs.as_ref(), descriptor_value);
            ExporterResponse "ExporterResponse" ?empty =
                Value::text_map(record.exporter_response.iter().map(|(name, value)| (name.as_str(), value.as_str())));
            Result "Result" ?empty = Value::option(record.result.as_ref(), result_value);
            Results "Results" ?empty = map(&record.results, result_value);
            Generation "Generation" ?empty = Value::Int(i64::from(record.generation));
            Trace "trace" ?empty = Value::option(record.trace.as_ref(), descriptor_value);
            Pinned "pinned" ?empty = Value::Bool(record.pinned);
            NumCachedSteps "numCachedSteps" ?empty = Value::Int(i64::from(record.num_cached_steps));
            NumTotalSteps "numTotalSteps" ?empty = Value::Int(i64::from(record.num_total_steps));
            NumCompletedSteps "numCompletedSteps" ?empty = Value::Int(i64::from(record.num_completed_steps));
            ExternalError "externalError" ?empty = Value::option(record.external_error.as_ref(), descriptor_value);
            NumWarnings "numWarnings" ?empty = Value::Int(i64::from(record.num_warnings));
        });
    }
}

fn list<T>(entries: &[T], make: fn(&T) -> Value) -> Value {
    Value::option(Some(entries).filter(|entries| !entries.is_empty()), |entries| {
        Value::List(entries.iter().map(make).collect())
    })
}

fn map<K: ToString, T>(entries: &BTreeMap<K, T>, make: fn(&T) -> Value) -> Value {
    Value::option(Some(entries).filter(|entries| !entries.is_empty()), |entries| {
        Value::Map(
            entries
                .iter()
                .map(|(key, value)| (key.to_string(), make(value)))
                .collect(),
        )
    })
}

fn exporter_value(exporter: &control::Exporter) -> Value {
    go_struct! {
        Type "Type" ?empty = Value::text(&exporter.r#type);
        Attrs "Attrs" ?empty =
            Value::text_map(exporter.attrs.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    }
}

fn descriptor_value(descriptor: &control::Descriptor) -> Value {
    go_struct! {
        MediaType "media_type" ?empty = Value::text(&descriptor.media_type);
        Digest "digest" ?empty = Value::text(&descriptor.digest);
        Size "size" ?empty = Value::Int(descriptor.size);
        Annotations "annotations" ?empty =
            Value::text_map(descriptor.annotations.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    }
}

fn result_value(result: &control::BuildResultInfo) -> Value {
    go_struct! {
        ResultDeprecated "ResultDeprecated" ?empty =
            Value::option(result.result_deprecated.as_ref(), descriptor_value);
        Attestations "Attestations" ?empty = list(&result.attestations, descriptor_value);
        Results "Results" ?empty = map(&result.results, descriptor_value);
    }
}

fn timestamp_value(at: &prost_types::Timestamp) -> Value {
    go_struct! {
        Seconds "seconds" ?empty = Value::Int(at.seconds);
        Nanos "nanos" ?empty = Value::Int(i64::from(at.nanos));
    }
}

/// Returns the cells of a history record: type, ref, creation, completion, generation.
pub fn history_cells(event: &control::BuildHistoryEvent) -> [String; 5] {
    let record = event.record.clone().unwrap_or_default();
    let time =
        |at: &Option<prost_types::Timestamp>| at.as_ref().map(|at| instant(at).rfc3339()).unwrap_or_default();
    [
        event.r#type().as_str_name().to_owned(),
        record.r#ref.clone(),
        time(&record.created_at),
        time(&record.completed_at),
        record.generation.to_string(),
    ]
}

/// Makes the table that these functions print into.
pub fn table() -> Table {
    Table::new(Padding::Tabs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, size: i64, in_use: bool, shared: bool) -> control::UsageRecord {
        control::UsageRecord {
            id: id.to_owned(),
            size,
            in_use,
            shared,
            ..Default::default()
        }
    }

    #[test]
    fn usage_is_a_table_with_sums() {
        let records = [record("a", 1_500_000, true, false), record("b", 500, false, true)];
        let mut out = table();
        print_usage_heading(&mut out);
        records
            .iter()
            .for_each(|record| print_usage_row(&mut out, record));
        print_usage_sums(&mut out, &records);
        let text = out.take();
        let words: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(words[0], ["ID", "RECLAIMABLE", "SIZE", "LAST", "ACCESSED"]);
        assert_eq!(words[1], ["a", "false", "1.50MB"]);
        assert_eq!(words[2], ["b", "true", "500B*"]);
        assert_eq!(
            words[3..],
            [
                ["Shared:", "500B"],
                ["Private:", "1.50MB"],
                ["Reclaimable:", "500B"],
                ["Total:", "1.50MB"]
            ]
        );
    }

    #[test]
    fn usage_has_go_names() {
        let json = usage_value(&record("a", 5, false, false)).to_json(false);
        assert_eq!(
            json,
            r#"{"id":"a","mutable":false,"inUse":false,"size":5,"createdAt":"1970-01-01T00:00:00Z","lastUsedAt":null,"usageCount":0,"parents":null,"description":"","recordType":"","shared":false}"#
        );
    }

    #[test]
    fn history_tells_what_was_made() {
        let descriptor = control::Descriptor {
            digest: "sha256:0".to_owned(),
            size: 7,
            ..Default::default()
        };
        let record = control::BuildHistoryRecord {
            r#ref: "r".to_owned(),
            exporters: vec![control::Exporter {
                r#type: "oci".to_owned(),
                ..Default::default()
            }],
            result: Some(control::BuildResultInfo {
                results: [(0, descriptor.clone())].into(),
                ..Default::default()
            }),
            logs: Some(descriptor),
            ..Default::default()
        };
        let event = control::BuildHistoryEvent {
            r#type: 1,
            record: Some(record),
        };
        assert_eq!(
            history_value(&event).to_json(false),
            r#"{"type":1,"record":{"Ref":"r","Exporters":[{"Type":"oci"}],"logs":{"digest":"sha256:0","size":7},"Result":{"Results":{"0":{"digest":"sha256:0","size":7}}}}}"#
        );
    }

    #[test]
    fn workers_are_listed_with_their_rules() {
        let worker = worker::WorkerRecord {
            id: "w1".to_owned(),
            labels: [("l".to_owned(), "v".to_owned())].into(),
            platforms: vec![llb::pb::Platform {
                os: "linux".to_owned(),
                architecture: "amd64".to_owned(),
                ..Default::default()
            }],
            gc_policy: vec![worker::GcPolicy {
                keep_duration: 172_800_000_000_000,
                max_used_space: 512_000_000,
                filters: vec!["type==x".to_owned()],
                ..Default::default()
            }],
            ..Default::default()
        };
        let mut out = table();
        print_workers(&mut out, std::slice::from_ref(&worker));
        assert_eq!(out.take(), "ID\tPLATFORMS\nw1\tlinux/amd64\n");
        print_workers_verbose(&mut out, std::slice::from_ref(&worker));
        let text = out.take();
        assert!(
            text.contains("GC Policy rule#0:\n") && text.contains("48h0m0s") && text.contains("512MB"),
            "{text}"
        );
    }
}
