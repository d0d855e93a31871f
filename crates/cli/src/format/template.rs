//! The part of Go's text templates that `--format` is used with: fields, `json`, `len`, `range`, `if`, `with`.

use super::value::Value;

/// Why a template cannot be used. The texts follow Go's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TemplateError {
    /// An action without its end.
    #[error("template: :1: unclosed action")]
    Unclosed,
    /// A function that does not exist here.
    #[error("template: :1: function {name:?} not defined")]
    Function {
        /// The function's name.
        name: String,
    },
    /// Anything else that cannot be read.
    #[error("template: :1: unexpected {what:?}")]
    Unexpected {
        /// What was read.
        what: String,
    },
    /// A field that the value does not have.
    #[error("template: :1: can't evaluate field {field}")]
    Field {
        /// The field's name.
        field: String,
    },
}

#[derive(Clone, Debug)]
enum Part {
    Text(String),
    Print(Vec<Call>),
    Range {
        over: Vec<Call>,
        body: Vec<Part>,
        otherwise: Vec<Part>,
    },
    If {
        condition: Vec<Call>,
        rebind: bool,
        body: Vec<Part>,
        otherwise: Vec<Part>,
    },
}

/// One command of a pipeline.
#[derive(Clone, Debug)]
enum Call {
    Operand(Operand),
    Json(Option<Operand>),
    Len(Option<Operand>),
}

#[derive(Clone, Debug)]
enum Operand {
    Literal(String),
    Path(Vec<String>),
}

/// A parsed template.
#[derive(Clone, Debug)]
pub struct Template {
    parts: Vec<Part>,
}

impl Template {
    /// Parses a template; the word `json` alone means `{{json .}}`.
    ///
    /// # Errors
    /// [`TemplateError`] for what cannot be read.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let text = if text == "json" { "{{json .}}" } else { text };
        let mut rest = text;
        let (parts, end) = parse_parts(&mut rest)?;
        match end {
            None => Ok(Self { parts }),
            Some(word) => Err(TemplateError::Unexpected { what: word }),
        }
    }

    /// Applies the template to a value.
    ///
    /// # Errors
    /// [`TemplateError::Field`] for a field that the value lacks.
    pub fn render(&self, value: &Value) -> Result<String, TemplateError> {
        let mut out = String::new();
        render(&self.parts, value, &mut out)?;
        Ok(out)
    }
}

fn parse_parts(rest: &mut &str) -> Result<(Vec<Part>, Option<String>), TemplateError> {
    let mut parts = Vec::new();
    loop {
        let Some((before, after)) = rest.split_once("{{") else {
            if !rest.is_empty() {
                parts.push(Part::Text((*rest).to_owned()));
            }
            *rest = "";
            return Ok((parts, None));
        };
        let (before, after) = match after.strip_prefix("- ") {
            Some(after) => (before.trim_end(), after),
            None => (before, after),
        };
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        let (action, next) = after.split_once("}}").ok_or(TemplateError::Unclosed)?;
        let (action, next) = match action.strip_suffix(" -") {
            Some(action) => (action, next.trim_start()),
            None => (action, next),
        };
        *rest = next;
        let action = action.trim();
        let (word, arguments) = action.split_once(char::is_whitespace).unwrap_or((action, ""));
        match word {
            "end" | "else" => return Ok((parts, Some(word.to_owned()))),
            "range" => {
                let over = pipeline(arguments)?;
                let (body, otherwise) = parse_branches(rest)?;
                parts.push(Part::Range {
                    over,
                    body,
                    otherwise,
                });
            }
            "if" | "with" => {
                let condition = pipeline(arguments)?;
                let (body, otherwise) = parse_branches(rest)?;
                parts.push(Part::If {
                    condition,
                    rebind: word == "with",
                    body,
                    otherwise,
                });
            }
            _ if action.starts_with("/*") => {}
            _ => parts.push(Part::Print(pipeline(action)?)),
        }
    }
}

fn parse_branches(rest: &mut &str) -> Result<(Vec<Part>, Vec<Part>), TemplateError> {
    let (body, end) = parse_parts(rest)?;
    match end.as_deref() {
        Some("end") => Ok((body, Vec::new())),
        Some("else") => match parse_parts(rest)? {
            (otherwise, Some(word)) if word == "end" => Ok((body, otherwise)),
            (_, Some(word)) => Err(TemplateError::Unexpected { what: word }),
            (_, None) => Err(TemplateError::Unexpected {
                what: "EOF".to_owned(),
            }),
        },
        _ => Err(TemplateError::Unexpected {
            what: "EOF".to_owned(),
        }),
    }
}

fn pipeline(text: &str) -> Result<Vec<Call>, TemplateError> {
    text.split('|').map(|command| call(command.trim())).collect()
}

fn call(command: &str) -> Result<Call, TemplateError> {
    let (word, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let argument = argument.trim();
    let optional = || (!argument.is_empty()).then(|| operand(argument)).transpose();
    match word {
        "json" => Ok(Call::Json(optional()?)),
        "len" => Ok(Call::Len(optional()?)),
        _ => operand(command).map(Call::Operand),
    }
}

fn operand(text: &str) -> Result<Operand, TemplateError> {
    if let Some(path) = text.strip_prefix('.') {
        let names = path
            .split('.')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect::<Vec<_>>();
        if names
            .iter()
            .all(|name| name.chars().all(|c| c.is_alphanumeric() || c == '_'))
        {
            return Ok(Operand::Path(names));
        }
    } else if let Some(inner) = text.strip_prefix('"').and_then(|inner| inner.strip_suffix('"')) {
        return Ok(Operand::Literal(
            inner
                .replace("\\n", "\n")
                .replace("\\t", "\t")
                .replace("\\\"", "\""),
        ));
    } else if text.chars().all(|c| c.is_alphanumeric()) && !text.is_empty() {
        return Err(TemplateError::Function {
            name: text.to_owned(),
        });
    }
    Err(TemplateError::Unexpected {
        what: text.to_owned(),
    })
}

fn look_up(operand: &Operand, dot: &Value) -> Result<Value, TemplateError> {
    let path = match operand {
        Operand::Literal(text) => return Ok(Value::text(text)),
        Operand::Path(path) => path,
    };
    let mut value = dot;
    for name in path {
        value = match value {
            Value::Struct(fields) => fields
                .iter()
                .find(|field| field.name == name)
                .map(|field| &field.value)
                .ok_or_else(|| TemplateError::Field { field: name.clone() })?,
            Value::Map(map) => map.get(name).unwrap_or(&Value::Null),
            _ => return Err(TemplateError::Field { field: name.clone() }),
        };
    }
    Ok(value.clone())
}

fn evaluate(calls: &[Call], dot: &Value) -> Result<Value, TemplateError> {
    let mut value = None;
    for call in calls {
        let argument = |operand: &Option<Operand>, piped: Option<Value>| match (operand, piped) {
            (Some(operand), _) => look_up(operand, dot),
            (None, Some(piped)) => Ok(piped),
            (None, None) => Err(TemplateError::Unexpected {
                what: "missing argument".to_owned(),
            }),
        };
        value = Some(match call {
            Call::Operand(operand) => look_up(operand, dot)?,
            Call::Json(operand) => Value::Text(argument(operand, value)?.to_json(false)),
            Call::Len(operand) => {
                let len = match argument(operand, value)? {
                    Value::List(list) => list.len(),
                    Value::Map(map) => map.len(),
                    Value::Text(text) => text.len(),
                    Value::Bytes(bytes) => bytes.len(),
                    _ => 0,
                };
                Value::Int(i64::try_from(len).unwrap_or(i64::MAX))
            }
        });
    }
    value.ok_or_else(|| TemplateError::Unexpected {
        what: "empty action".to_owned(),
    })
}

fn render(parts: &[Part], dot: &Value, out: &mut String) -> Result<(), TemplateError> {
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Print(calls) => out.push_str(&evaluate(calls, dot)?.to_plain()),
            Part::Range {
                over,
                body,
                otherwise,
            } => {
                let items: Vec<Value> = match evaluate(over, dot)? {
                    Value::List(list) => list,
                    Value::Map(map) => map.into_values().collect(),
                    _ => Vec::new(),
                };
                for item in &items {
                    render(body, item, out)?;
                }
                if items.is_empty() {
                    render(otherwise, dot, out)?;
                }
            }
            Part::If {
                condition,
                rebind,
                body,
                otherwise,
            } => {
                let value = evaluate(condition, dot)?;
                if value.is_empty() {
                    render(otherwise, dot, out)?;
                } else {
                    render(body, if *rebind { &value } else { dot }, out)?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::value::go_struct;
    use super::*;

    fn records() -> Value {
        let record = |id: &str, shared| {
            go_struct! {
                ID "id" = Value::text(id);
                Shared "shared" ?empty = Value::Bool(shared);
            }
        };
        Value::List(vec![record("a", true), record("b", false)])
    }

    fn rendered(template: &str) -> Result<String, TemplateError> {
        Template::parse(template).and_then(|template| template.render(&records()))
    }

    #[test]
    fn renders_what_scripts_use() {
        assert_eq!(
            rendered("json").unwrap(),
            r#"[{"id":"a","shared":true},{"id":"b"}]"#
        );
        assert_eq!(
            rendered("{{json .}}").unwrap(),
            rendered("{{ . | json }}").unwrap()
        );
        assert_eq!(
            rendered("{{range .}}{{.ID}}={{.Shared}};{{end}}").unwrap(),
            "a=true;b=false;"
        );
        assert_eq!(
            rendered("{{range .}}{{if .Shared}}yes{{else}}no{{end}} {{end}}").unwrap(),
            "yes no "
        );
        assert_eq!(rendered("{{len .}}").unwrap(), "2");
        assert_eq!(rendered("{{range . -}}  x {{- end}}").unwrap(), "xx");
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert_eq!(
            rendered("{{upper}}"),
            Err(TemplateError::Function {
                name: "upper".to_owned()
            })
        );
        assert_eq!(rendered("{{.ID"), Err(TemplateError::Unclosed));
        assert_eq!(
            rendered("{{range .}}{{.X}}{{end}}"),
            Err(TemplateError::Field {
                field: "X".to_owned()
            })
        );
        assert!(rendered("{{range .}}").is_err());
        assert!(rendered("{{end}}").is_err());
        assert!(rendered("{{}}").is_err());
    }
}
