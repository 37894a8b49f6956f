//! The loss of a run as an SVG picture: the loss of every step, its mean, and below it the bits per
//! byte of held-out text. No fonts or scripts from elsewhere.

use std::fmt::Write;

use super::log::Row;

const WIDTH: f64 = 860.0;
const PANEL: f64 = 270.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const GAP: f64 = 52.0;
/// Most points drawn of a curve.
const POINTS: usize = 600;

/// A picture of `rows`, or `None` where there are too few to see anything; `measured_on` says which text
/// the bits a byte are of.
pub(super) fn svg(name: &str, measured_on: &str, rows: &[Row]) -> Option<String> {
    let losses: Vec<(f64, f64)> =
        rows.iter().filter(|row| row.loss.is_finite()).map(|row| (row.tokens, row.loss)).collect();
    let bits: Vec<(f64, f64)> =
        rows.iter().filter_map(|row| Some((row.tokens, row.bits_per_byte?))).collect();
    if losses.len() < 2 {
        return None;
    }
    let two = bits.len() >= 2;
    let height = TOP + PANEL + GAP + if two { PANEL + GAP } else { 0.0 };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
        escape(name)
    );
    let end = losses.last()?.0;
    let smooth = means(&losses, POINTS / 4);
    // The first losses, near ln(vocabulary), would press the rest together: cut them off above.
    let high = smooth.get(1).or(smooth.first())?.1;
    let panel = Panel::new(TOP, end, &losses, Some(high));
    panel.frame(&mut out, "training loss, nats a token");
    panel.curve(&mut out, &means(&losses, POINTS), "#b8c4d6", 1.0);
    panel.curve(&mut out, &smooth, "#1f4e8c", 2.0);
    if two {
        let panel = Panel::new(TOP + PANEL + GAP, end, &bits, None);
        panel.frame(&mut out, &escape(&format!("bits a byte of {measured_on}")));
        panel.curve(&mut out, &bits, "#a8431f", 2.0);
        let (x, y) = *bits.last()?;
        let (px, py) = (panel.x(x), panel.y(y));
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#a8431f\">{y:.3}</text>",
            px - 4.0,
            py - 6.0
        );
    }
    out.push_str("</svg>\n");
    Some(out)
}

/// One coordinate system.
struct Panel {
    top: f64,
    end: f64,
    low: f64,
    high: f64,
}

impl Panel {
    fn new(top: f64, end: f64, points: &[(f64, f64)], high: Option<f64>) -> Self {
        let low = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
        let most = points.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        let high = high.unwrap_or(most).min(most).max(low + 1e-3);
        let margin = (high - low) * 0.05;
        Self { top, end: end.max(1.0), low: low - margin, high: high + margin }
    }

    fn x(&self, x: f64) -> f64 {
        LEFT + x / self.end * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        let share = ((y - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.top + (1.0 - share) * PANEL
    }

    fn frame(&self, out: &mut String, title: &str) {
        let (right, bottom) = (WIDTH - RIGHT, self.top + PANEL);
        for value in ticks(self.low, self.high) {
            let y = self.y(value);
            let _ = writeln!(
                out,
                "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#e4e4e4\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                number(value)
            );
        }
        for value in ticks(0.0, self.end) {
            let x = self.x(value);
            let _ = writeln!(
                out,
                "<path d=\"M{x:.1} {bottom}v4\" stroke=\"#888\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 17.0,
                number(value)
            );
        }
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" font-weight=\"bold\">{title}</text>\
             <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">tokens</text>",
            self.top,
            right - 4.0,
            self.top + 14.0,
            bottom + 32.0
        );
    }

    fn curve(&self, out: &mut String, points: &[(f64, f64)], color: &str, width: f64) {
        out.push_str("<path d=\"");
        for (i, &(x, y)) in points.iter().enumerate() {
            let _ =
                write!(out, "{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, self.x(x), self.y(y));
        }
        let _ = writeln!(out, "\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\"/>");
    }
}

/// Means of about `n` runs of neighbouring points.
fn means(points: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(n.max(1)).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        let sum = chunk.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / n, sum.1 / n)
    };
    points.chunks(size).map(mean).collect()
}

/// Four to ten round numbers inside a range.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= 0.999 * rough);
    let step = step.unwrap_or(rough);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number with a unit prefix and no needless digits.
fn number(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, " G"),
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e3 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{}{unit}", if text.is_empty() || text == "-" { "0" } else { text })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_both_curves_and_stays_small() {
        let rows: Vec<Row> = (1..=20_000)
            .map(|i| Row {
                tokens: f64::from(i) * 2048.0,
                loss: 3.0 + 5.0 / f64::from(i).sqrt(),
                bits_per_byte: (i % 1000 == 0).then(|| 1.5 + 1.0 / f64::from(i)),
            })
            .collect();
        let picture = svg("a < b & c", "held-out & kept.txt", &rows).unwrap();
        assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("a &lt; b &amp; c"));
        assert!(
            picture.contains("nats a token")
                && picture.contains("bits a byte of held-out &amp; kept.txt")
        );
        assert!(picture.len() < 64 << 10, "{} bytes", picture.len());
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
        assert!(svg("few", "text", &rows[..1]).is_none());
        let alone = svg("short", "text", &rows[..10]).unwrap();
        assert!(!alone.contains("bits a byte"));
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 6.0), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert!((6..=7).contains(&ticks(1.45, 1.75).len()), "the ends may fall off by a rounding");
        assert_eq!([0.0, 0.25, 1500.0, 2e6].map(number), ["0", "0.25", "1.5 k", "2 M"]);
    }
}
