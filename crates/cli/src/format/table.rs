//! Columns aligned as Go's `text/tabwriter` aligns them: cells end at tabs, a column is a run of lines that have the cell.

/// How columns are padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// With tabs, 8 wide.
    Tabs,
    /// With spaces.
    Spaces,
}

const TAB_WIDTH: usize = 8;

/// Collects lines and prints them aligned.
#[derive(Debug)]
pub struct Table {
    padding: Padding,
    text: String,
}

impl Table {
    /// Makes an empty table.
    pub fn new(padding: Padding) -> Self {
        Self {
            padding,
            text: String::new(),
        }
    }

    /// Appends a line; cells are separated by tabs, a cell before a tab is aligned.
    pub fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// Returns everything appended since the last call, aligned.
    pub fn take(&mut self) -> String {
        let text = std::mem::take(&mut self.text);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
        let mut out = String::with_capacity(text.len() * 2);
        self.block(&lines, &mut Vec::new(), &mut out);
        out
    }

    /// Prints lines whose first `widths.len()` columns are known, finding the next column's runs.
    fn block(&self, lines: &[Vec<&str>], widths: &mut Vec<usize>, out: &mut String) {
        let column = widths.len();
        let mut start = 0;
        while start < lines.len() {
            let has_cell = |line: &Vec<&str>| column + 1 < line.len();
            if !has_cell(&lines[start]) {
                self.print(&lines[start], widths, out);
                start += 1;
                continue;
            }
            let end = lines[start..]
                .iter()
                .position(|line| !has_cell(line))
                .map_or(lines.len(), |len| start + len);
            let widest = lines[start..end]
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0);
            widths.push(widest + 1);
            self.block(&lines[start..end], widths, out);
            widths.pop();
            start = end;
        }
    }

    fn print(&self, line: &[&str], widths: &[usize], out: &mut String) {
        for (index, cell) in line.iter().enumerate() {
            out.push_str(cell);
            let Some(width) = widths.get(index) else { continue };
            let len = cell.chars().count();
            match self.padding {
                Padding::Spaces => out.extend(std::iter::repeat_n(' ', width - len)),
                Padding::Tabs => {
                    let full = width.div_ceil(TAB_WIDTH) * TAB_WIDTH;
                    out.extend(std::iter::repeat_n('\t', (full - len).div_ceil(TAB_WIDTH)));
                }
            }
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_runs_of_cells() {
        let mut table = Table::new(Padding::Tabs);
        table.line("ID\tPLATFORMS");
        table.line("0123456789\tlinux/amd64");
        assert_eq!(table.take(), "ID\t\tPLATFORMS\n0123456789\tlinux/amd64\n");
        assert_eq!(table.take(), "");
    }

    #[test]
    fn a_line_without_the_cell_ends_the_column() {
        let mut table = Table::new(Padding::Spaces);
        table.line("a:\t1");
        table.line("Labels:");
        table.line("\tlong.label:\tx");
        table.line("\tb:\ty");
        assert_eq!(table.take(), "a: 1\nLabels:\n long.label: x\n b:          y\n");
    }

    #[test]
    fn empty_leading_cells_become_tabs() {
        let mut table = Table::new(Padding::Tabs);
        table.line("\tName:\tx");
        assert_eq!(table.take(), "\tName:\tx\n");
    }
}
