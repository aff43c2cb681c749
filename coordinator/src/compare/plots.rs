//! All runs' quantities as lines over iterations: one panel a quantity, one figure.

use std::error::Error;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::{
    BitMapBackend, ChartBuilder, Circle, DrawingArea, DrawingBackend, IntoDrawingArea, LineSeries,
    RGBColor, Rectangle, SVGBackend, Text, WHITE,
};
use plotters::style::{Color, FontStyle, register_font};

use super::{Quantity, RunMeasures};

/// Pixels of a panel.
const PANEL: (u32, u32) = (340, 240);
/// Panels in a row.
const COLUMNS: usize = 4;
/// Height of the legend above them.
const LEGEND: u32 = 40;
/// Colours that those with colour-blindness can tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];
const FONT: &str = "sans-serif";

/// Title, digits, and each run's points.
struct Panel {
    title: &'static str,
    digits: usize,
    lines: Vec<Vec<(f64, f64)>>,
}

/// The figure as SVG.
///
/// # Errors
/// What the drawing library says.
pub fn svg(quantities: &[Quantity], runs: &[RunMeasures]) -> Result<String> {
    let mut text = String::new();
    let panels = panels(quantities, runs);
    draw(SVGBackend::with_string(&mut text, size(&panels)), &panels, runs)?;
    text.push('\n');
    Ok(text)
}

/// The figure as PNG.
///
/// # Errors
/// What the drawing library says.
pub fn png(quantities: &[Quantity], runs: &[RunMeasures]) -> Result<Vec<u8>> {
    let panels = panels(quantities, runs);
    let (width, height) = size(&panels);
    let mut pixels = vec![0; (width * height * 3) as usize];
    draw(BitMapBackend::with_buffer(&mut pixels, (width, height)), &panels, runs)?;
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}

fn draw<B: DrawingBackend>(backend: B, panels: &[Panel], runs: &[RunMeasures]) -> Result<()>
where
    B::ErrorType: 'static,
{
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| anyhow!("the built-in font cannot be read; report this as a bug"))?;
    let root = backend.into_drawing_area();
    figure(&root, panels, runs).map_err(|error| anyhow!("draw the figure: {error}"))
}

/// The quantities that some run has.
fn panels(quantities: &[Quantity], runs: &[RunMeasures]) -> Vec<Panel> {
    let points = |run: &RunMeasures, at: usize| {
        let point = |m: &super::Measured| Some((f64::from(m.iteration.0), m.values[at]?));
        run.iterations.iter().filter_map(point).filter(|(_, y)| y.is_finite()).collect()
    };
    let panel = |(at, quantity): (usize, &Quantity)| Panel {
        title: quantity.name,
        digits: quantity.digits,
        lines: runs.iter().map(|run| points(run, at)).collect(),
    };
    let mut panels: Vec<_> = quantities.iter().enumerate().map(panel).collect();
    panels.retain(|panel| panel.lines.iter().any(|line| !line.is_empty()));
    panels
}

fn size(panels: &[Panel]) -> (u32, u32) {
    let rows = panels.len().div_ceil(COLUMNS) as u32;
    (PANEL.0 * COLUMNS as u32, LEGEND + PANEL.1 * rows)
}

type Drawn = Result<(), Box<dyn Error>>;

fn figure<B: DrawingBackend>(
    root: &DrawingArea<B, Shift>,
    panels: &[Panel],
    runs: &[RunMeasures],
) -> Drawn
where
    B::ErrorType: 'static,
{
    root.fill(&WHITE)?;
    let (legend, body) = root.split_vertically(LEGEND as i32);
    let names: Vec<_> = runs.iter().map(|run| format!("{} ({})", run.name, run.method)).collect();
    let share = (PANEL.0 * COLUMNS as u32) as i32 / runs.len().max(1) as i32;
    for (at, name) in (0..).zip(&names) {
        let x = 20 + at * share;
        let square = [(x, 14), (x + 14, 28)];
        legend.draw(&Rectangle::new(square, colour(at as usize).filled()))?;
        legend.draw(&Text::new(name.clone(), (x + 22, 12), (FONT, 18)))?;
    }
    let areas = body.split_evenly((panels.len().div_ceil(COLUMNS).max(1), COLUMNS));
    for (panel, area) in panels.iter().zip(&areas) {
        draw_panel(area, panel)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel<B: DrawingBackend>(area: &DrawingArea<B, Shift>, panel: &Panel) -> Drawn
where
    B::ErrorType: 'static,
{
    let all = || panel.lines.iter().flatten();
    let last = all().map(|(x, _)| *x).fold(1.0, f64::max);
    let lowest = all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let highest = all().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    // A line that is level still needs a height.
    let room = ((highest - lowest) * 0.08).max(highest.abs() * 1e-3).max(1e-6);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .caption(panel.title, (FONT, 18))
        .x_label_area_size(22)
        .y_label_area_size(58)
        .build_cartesian_2d(-0.15..last + 0.15, lowest - room..highest + room)?;
    let whole = |x: &f64| match (x - x.round()).abs() < 1e-6 {
        true => format!("{x:.0}"),
        false => String::new(),
    };
    let digits = panel.digits;
    let number = |y: &f64| format!("{y:.digits$}");
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(last as usize + 2)
        .x_label_formatter(&whole)
        .y_labels(5)
        .y_label_formatter(&number)
        .label_style((FONT, 13))
        .draw()?;
    for (at, line) in panel.lines.iter().enumerate() {
        let colour = colour(at);
        chart.draw_series(LineSeries::new(line.iter().copied(), colour.stroke_width(2)))?;
        chart.draw_series(line.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
    }
    Ok(())
}

fn colour(at: usize) -> RGBColor {
    COLOURS[at % COLOURS.len()]
}
