//! Rows as Markdown for people, CSV for tables, JSON for machines. JSON keeps every sample.

use super::ceilings::Ceilings;
use super::samples::{Floor, Row};
use crate::error::{Error, Result};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// What JSON files say they are.
pub const SCHEMA: &str = "warpstep-bench-1";

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A Markdown table.
    Md,
    /// Comma-separated values.
    Csv,
    /// One JSON object with every sample.
    Json,
}

/// What was run where.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Header {
    /// `model` or `kernels`.
    pub kind: String,
    /// Model, synthetic or not.
    pub model: String,
    /// Kind of the device: `cuda`, `emulated`.
    pub device: String,
    /// Its name.
    pub name: String,
    /// Its SMs.
    pub sm_count: u32,
    /// Version of the driver, clocks and power, where they can be read.
    pub card: Vec<String>,
    /// Version of this program.
    pub version: String,
    /// Commit that it was built from, where that is known.
    pub commit: String,
    /// The command line.
    pub flags: Vec<String>,
    /// When, as ISO 8601 in UTC.
    pub date: String,
    /// What a reader must know.
    pub notes: Vec<String>,
}

/// What is said of every figure from the emulated device.
pub const EMULATED: &str = "times on the emulated device are those of a simulation on this CPU: they say nothing \
                            about a GPU";

/// A finished run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was run where.
    pub header: Header,
    /// The ceilings of this run.
    pub ceilings: Ceilings,
    /// What was measured.
    pub rows: Vec<Row>,
}

/// Columns that a model's table leaves out: its rows all have the same settings, and run many kernels each.
const IDENTITY: [&str; 4] = ["variant", "dtype", "shape", "l2"];

const COLUMNS: [&str; 17] = [
    "test",
    "variant",
    "dtype",
    "shape",
    "l2",
    "median ms",
    "p10",
    "p90",
    "min",
    "runs",
    "MB",
    "floor ms",
    "GB/s",
    "of copy",
    "of read",
    "TFLOP/s",
    "note",
];

impl Report {
    /// The whole report.
    pub fn text(&self, format: Format) -> Result<String> {
        match format {
            Format::Md => Ok(self.markdown()),
            Format::Csv => Ok(self.csv()),
            Format::Json => self.json(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Row> {
        self.ceilings.rows().into_iter().chain(&self.rows)
    }

    /// The cells of one row, in the order of [`COLUMNS`].
    fn cells(&self, row: &Row) -> [String; COLUMNS.len()] {
        let ms = |value: f64| if value.is_finite() { format!("{value:.4}") } else { String::new() };
        let rate = |shown: bool, value: f64, digits: usize| match shown && value.is_finite() {
            true => format!("{value:.digits$}"),
            false => String::new(),
        };
        let in_memory = row.bytes > 0 && row.floor == Floor::Copy;
        let ratio = |ceiling: &Row| rate(in_memory, row.gb_per_s() / ceiling.gb_per_s(), 3);
        [
            row.test.clone(),
            row.variant.clone(),
            row.dtype.clone(),
            row.shape.clone(),
            row.l2.clone(),
            ms(row.median()),
            ms(row.quantile(0.1)),
            ms(row.quantile(0.9)),
            ms(row.quantile(0.0)),
            row.samples_ms.len().to_string(),
            rate(row.bytes > 0, row.bytes as f64 / 1e6, 3),
            rate(row.bytes > 0, self.floor_ms(row), 4),
            rate(row.bytes > 0, row.gb_per_s(), 2),
            ratio(&self.ceilings.copy),
            ratio(&self.ceilings.read),
            rate(row.flops > 0, row.tflop_per_s(), 3),
            row.note.clone(),
        ]
    }

    /// Milliseconds below which a row cannot be; NaN where that is not known.
    fn floor_ms(&self, row: &Row) -> f64 {
        match row.floor {
            Floor::Copy => self.ceilings.floor_ms(row.bytes),
            Floor::Own(ms) => ms,
            Floor::None => f64::NAN,
        }
    }

    fn markdown(&self) -> String {
        let header = &self.header;
        let mut text = format!(
            "# warpstep {}: {} on {} ({}, {} SMs)\n\n",
            header.version, header.model, header.name, header.device, header.sm_count
        );
        let facts = header.card.iter().chain(&header.notes);
        for line in facts.chain([&format!("commit {}, {}", header.commit, header.date)]) {
            let _ = writeln!(text, "- {line}");
        }
        // Columns in which no row says anything would only widen the table.
        let rows: Vec<[String; COLUMNS.len()]> = self.all().map(|row| self.cells(row)).collect();
        let shown: Vec<usize> = (0..COLUMNS.len())
            .filter(|&column| rows.iter().any(|cells| !cells[column].is_empty()))
            .filter(|&column| header.kind != "model" || !IDENTITY.contains(&COLUMNS[column]))
            .collect();
        let line = |cells: &[String]| {
            let cells: Vec<&str> = shown.iter().map(|&column| cells[column].as_str()).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        text += "\n";
        text += &line(&COLUMNS.map(String::from));
        text += &format!("|{}\n", "---|".repeat(shown.len()));
        rows.iter().for_each(|cells| text += &line(cells));
        if header.kind == "model" {
            let kernels: BTreeSet<&str> =
                self.rows.iter().flat_map(|row| row.variant.split_whitespace()).collect();
            let names: Vec<&str> = kernels.into_iter().collect();
            let _ = writeln!(text, "\nkernels that ran: {}", names.join(" "));
        }
        text
    }

    fn csv(&self) -> String {
        let line = |cells: &[String]| {
            let quoted: Vec<String> =
                cells.iter().map(|cell| format!("\"{}\"", cell.replace('"', "\"\""))).collect();
            quoted.join(",") + "\n"
        };
        let mut text = line(&COLUMNS.map(String::from));
        self.all().for_each(|row| text += &line(&self.cells(row)));
        text
    }

    fn json(&self) -> Result<String> {
        let figures = |row: &Row| {
            let ratio = |ceiling: &Row| match row.floor {
                Floor::Copy => row.gb_per_s() / ceiling.gb_per_s(),
                _ => f64::NAN,
            };
            serde_json::json!({
                "test": row.test, "variant": row.variant, "dtype": row.dtype, "shape": row.shape, "l2": row.l2,
                "bytes": row.bytes, "flops": row.flops, "note": row.note, "samples_ms": row.samples_ms,
                "median_ms": row.median(), "p10_ms": row.quantile(0.1), "p90_ms": row.quantile(0.9),
                "min_ms": row.quantile(0.0), "runs": row.samples_ms.len(),
                "floor_ms": self.floor_ms(row), "gb_per_s": row.gb_per_s(),
                "of_copy": ratio(&self.ceilings.copy),
                "of_read": ratio(&self.ceilings.read),
                "tflop_per_s": row.tflop_per_s(),
            })
        };
        let value = serde_json::json!({
            "schema": SCHEMA,
            "header": self.header,
            "ceilings": self.ceilings.rows().map(figures),
            "rows": self.rows.iter().map(figures).collect::<Vec<_>>(),
        });
        let text = serde_json::to_string_pretty(&value);
        text.map(|text| text + "\n").map_err(|error| Error::Internal(format!("report: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let row = |test: &str, bytes, ms: f64| Row {
            test: test.into(),
            bytes,
            samples_ms: vec![ms; 3],
            ..Row::default()
        };
        let ceilings = Ceilings {
            copy: row("copy", 3_000_000, 1.0),
            read: row("read", 4_000_000, 1.0),
            gemm: Row { flops: 2_000_000_000, ..row("product", 1, 1.0) },
        };
        let unbuilt = Row { test: "token: LM head".into(), note: "not built".into(), ..Row::default() };
        let rows = vec![Row { shape: "a, \"b\"".into(), ..row("x", 6_000_000, 4.0) }, unbuilt];
        Report { header: Header::default(), ceilings, rows }
    }

    #[test]
    fn floors_and_ratios_are_those_of_the_runs_own_copy() {
        let report = report();
        let cells = report.cells(&report.rows[0]);
        let cell = |name: &str| &cells[COLUMNS.iter().position(|c| *c == name).unwrap()];
        assert_eq!(cell("floor ms"), "2.0000");
        assert_eq!((cell("GB/s").as_str(), cell("of copy").as_str()), ("1.50", "0.500"));
        assert_eq!((cell("of read").as_str(), cell("TFLOP/s").as_str()), ("0.375", ""));
        // Bytes that come from the host have a floor of their own, or none.
        for (floor, shown) in [(Floor::Own(3.5), "3.5000"), (Floor::None, "")] {
            let cells = report.cells(&Row { floor, ..report.rows[0].clone() });
            let cell = |name: &str| cells[COLUMNS.iter().position(|c| *c == name).unwrap()].as_str();
            assert_eq!((cell("floor ms"), cell("GB/s"), cell("of copy")), (shown, "1.50", ""));
        }
        // What was not measured shows no figure.
        let cells = report.cells(&report.rows[1]);
        assert_eq!((cells[5].as_str(), cells[9].as_str(), cells[16].as_str()), ("", "0", "not built"));
    }

    #[test]
    fn every_format_holds_every_row_and_json_every_sample() {
        let report = report();
        assert_eq!(report.text(Format::Md).unwrap().matches("\n| ").count(), 6);
        let csv = report.text(Format::Csv).unwrap();
        assert_eq!(csv.lines().count(), 6);
        assert!(csv.contains("\"a, \"\"b\"\"\""));
        let json: serde_json::Value = serde_json::from_str(&report.text(Format::Json).unwrap()).unwrap();
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!(json["rows"][0]["samples_ms"], serde_json::json!([4.0, 4.0, 4.0]));
        assert_eq!(json["rows"][0]["floor_ms"], 2.0);
        // JSON has no NaN: what was not measured is null.
        assert!(json["rows"][1]["median_ms"].is_null());
    }
}
