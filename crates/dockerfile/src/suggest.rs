//! "Did you mean": the closest of some options.

/// Distances of this and more are no likeness.
const MAX_DISTANCE: usize = 3;

/// Finds the option closest to `value`; `None` if none is close, or if one is equal (then the value is not at fault).
pub(crate) fn search<S: AsRef<str>>(
    value: &str,
    options: impl IntoIterator<Item = S>,
    fold: bool,
) -> Option<String> {
    let wanted = if fold {
        value.to_lowercase()
    } else {
        value.to_owned()
    };
    let mut best = None;
    let mut best_distance = MAX_DISTANCE;
    for option in options {
        let option = option.as_ref();
        let option = if fold {
            option.to_lowercase()
        } else {
            option.to_owned()
        };
        if option == wanted {
            return None;
        }
        let distance = distance_below(&wanted, &option, best_distance);
        if let Some(distance) = distance {
            best_distance = distance;
            best = Some(if fold { match_case(&option, value) } else { option });
        }
    }
    best.filter(|found| !found.is_empty())
}

fn match_case(found: &str, original: &str) -> String {
    if original == original.to_lowercase() {
        found.to_lowercase()
    } else if original == original.to_uppercase() {
        found.to_uppercase()
    } else {
        found.to_owned()
    }
}

/// Computes the Levenshtein distance if it is below `bound`; looks at no more than a band around the diagonal.
fn distance_below(a: &str, b: &str, bound: usize) -> Option<usize> {
    if bound == 0 || a.len().abs_diff(b.len()) > 4 * bound {
        return None;
    }
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    if a.len().abs_diff(b.len()) >= bound {
        return None;
    }
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.iter().enumerate() {
        let from = (i + 1).saturating_sub(bound);
        let to = (i + 1 + bound).min(b.len());
        let mut row = vec![bound; b.len() + 1];
        if from == 0 {
            row[0] = i + 1;
        }
        for j in from.max(1)..=to {
            let substituted = previous[j - 1] + usize::from(*left != b[j - 1]);
            row[j] = substituted.min(previous[j] + 1).min(row[j - 1] + 1);
        }
        if row[from..=to].iter().all(|cost| *cost >= bound) {
            return None;
        }
        previous = row;
    }
    previous.last().copied().filter(|distance| *distance < bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_closest() {
        assert_eq!(
            search("FORM", ["ADD", "FROM", "RUN"], true).as_deref(),
            Some("FROM")
        );
        assert_eq!(search("form", ["ADD", "FROM"], true).as_deref(), Some("from"));
        assert_eq!(
            search("bsuybox", ["alpine", "busybox"], false).as_deref(),
            Some("busybox")
        );
        assert_eq!(search("alpine", ["alpine", "alpin"], false), None);
        assert_eq!(search("nothing", ["alpine"], false), None);
    }

    #[test]
    fn a_huge_word_is_cheap() {
        let huge = "x".repeat(1 << 20);
        assert_eq!(search(&huge, ["alpine", "busybox"], false), None);
    }
}
