// Draws one board out of its JSON and the answers that live.py has kept, with Grafana's own components. It runs in the browser; the
// page has put `board`, `answers` and the width into `window.input`.
import {
  FieldType,
  ThresholdsMode,
  createTheme,
  dateTime,
  getDisplayProcessor,
  ThemeContext,
} from "@grafana/data";
import { BigValue, PanelChrome, TimeSeries } from "@grafana/ui";
import { createRoot } from "react-dom/client";

const CELL = 30;
const GAP = 8;
const theme = createTheme({ colors: { mode: "dark" } });
const { board, answers, width } = window.input;
const range = {
  from: dateTime(answers.start * 1000),
  to: dateTime(answers.end * 1000),
  raw: { from: dateTime(answers.start * 1000), to: dateTime(answers.end * 1000) },
};

/** The name of a line, as legendFormat says. */
function nameOf(format, labels) {
  if (format === "__auto") {
    return Object.entries(labels).map(([name, value]) => `${name}="${value}"`).join(", ");
  }
  return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "");
}

/** One frame per line, on the time grid of the query, so that a gap is a gap. */
function framesOf(panel) {
  const frames = [];
  const { defaults, overrides } = panel.fieldConfig;
  const times = [];
  for (let at = answers.start; at <= answers.end + 1e-6; at += answers.step) {
    times.push(Math.round(at * 1000));
  }
  for (const target of panel.targets) {
    for (const line of answers.panels[board.uid]?.[panel.id]?.[target.refId] ?? []) {
      const name = nameOf(target.legendFormat, line.metric);
      const at = new Map(line.values.map(([time, value]) => [Math.round(time * 1000), Number(value)]));
      const values = times.map((time) => {
        const value = at.get(time);
        return Number.isFinite(value) ? value : null;
      });
      const config = structuredClone({ ...defaults, displayName: name });
      // A stat's first threshold has no value in JSON; for the components it is minus infinity.
      config.thresholds = {
        mode: ThresholdsMode.Absolute,
        steps: config.thresholds.steps.map((step) => ({ ...step, value: step.value ?? -Infinity })),
      };
      for (const override of overrides) {
        if (override.matcher.options === name) {
          for (const property of override.properties) {
            config[property.id] = property.value;
          }
        }
      }
      const field = { name, type: FieldType.number, config, values, state: { seriesIndex: frames.length, displayName: name } };
      // The registry of field settings is not part of the packages, so what it would do is done here.
      field.display = getDisplayProcessor({ field, theme });
      const time = { name: "Time", type: FieldType.time, config: {}, values: times };
      time.display = getDisplayProcessor({ field: time, theme });
      frames.push({ refId: target.refId, name, fields: [time, field], length: times.length });
    }
  }
  return frames;
}

/** The field, knowing how far its values reach, as a sparkline wants it. */
function ranged(field) {
  const values = field.values.filter((value) => value !== null);
  const [min, max] = [Math.min(...values), Math.max(...values)];
  return { ...field, state: { ...field.state, range: { min, max, delta: max - min } } };
}

function Stat({ panel, width, height }) {
  const [frame] = framesOf(panel);
  const { defaults } = panel.fieldConfig;
  const field = frame?.fields[1];
  const last = field?.values.findLast((value) => value !== null);
  const value =
    last === undefined
      ? { text: defaults.noValue ?? "No data", numeric: NaN, color: theme.colors.text.disabled }
      : field.display(last);
  const sparkline = last !== undefined && panel.options.graphMode === "area" ? { x: frame.fields[0], y: ranged(field) } : undefined;
  return (
    <BigValue
      theme={theme}
      width={width}
      height={height}
      value={value}
      colorMode={panel.options.colorMode}
      graphMode={panel.options.graphMode}
      justifyMode={panel.options.justifyMode}
      textMode={panel.options.textMode}
      sparkline={sparkline}
    />
  );
}

function Series({ panel, width, height }) {
  const frames = framesOf(panel);
  if (frames.length === 0) {
    return <div style={{ color: theme.colors.text.secondary, textAlign: "center", paddingTop: height / 2 - 10 }}>No data</div>;
  }
  return (
    <TimeSeries
      frames={frames}
      structureRev={1}
      width={width}
      height={height}
      timeRange={range}
      timeZone="utc"
      legend={panel.options.legend}
      options={panel.options}
    />
  );
}

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const column = (width - GAP) / 24;
  const place = { position: "absolute", left: GAP + x * column, top: GAP + y * (CELL + GAP) };
  const size = { width: w * column - GAP, height: h * (CELL + GAP) - GAP };
  if (panel.type === "row") {
    return <div style={{ ...place, ...size, fontSize: 16, fontWeight: 500, lineHeight: `${size.height}px` }}>{panel.title}</div>;
  }
  const Kind = panel.type === "stat" ? Stat : Series;
  return (
    <div style={place}>
      <PanelChrome title={panel.title} description={panel.description} padding={panel.type === "stat" ? "none" : "md"} {...size}>
        {(innerWidth, innerHeight) => <Kind panel={panel} width={innerWidth} height={innerHeight} />}
      </PanelChrome>
    </div>
  );
}

function Board() {
  return (
    <ThemeContext.Provider value={theme}>
      <h1 style={{ position: "absolute", left: GAP, top: -34, margin: 0, fontSize: 18, fontWeight: 500 }}>{board.title}</h1>
      {board.panels.map((panel) => (
        <Panel key={panel.id} panel={panel} />
      ))}
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById("board")).render(<Board />);
