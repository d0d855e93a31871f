//! `explain`.

use tonic::transport::Channel;

use super::args::ExplainArgs;
use crate::explanation::{self, Explanation};
use crate::failure::Failure;
use crate::format::value::{Value, go_struct};

pub(super) async fn explain(channel: Channel, args: ExplainArgs) -> Result<(), Failure> {
    let (build, found) = explanation::read(channel, args.build).await?;
    let text = if args.json {
        let steps = found.iter().map(Explanation::to_value).collect();
        let document = go_struct! {
            Ref "ref" = Value::text(build);
            Steps "steps" = Value::List(steps);
        };
        format!("{}\n", document.to_json(false))
    } else {
        explanation::to_text(&found)
    };
    crate::buildctl::write_stdout(&text)
}
