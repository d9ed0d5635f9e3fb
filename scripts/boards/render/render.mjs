// Pictures of the boards out of the answers of a real run:
//
//   scripts/boards/live.py URL --save answers.json
//   (cd scripts/boards/render && npm ci && node render.mjs ../../../answers.json ../../../docs)
//
// Needs Node and a Chromium (apt-get install chromium; or CHROMIUM=path); pngquant, if it is there, makes the files a third as large. What it cannot show: variables, links and annotations.
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { build } from "esbuild";

const WIDTH = 1600;
// Of board.jsx: the height of a cell of the grid and the gap between two; and the title.
const CELL = 38;
const TITLE = 40;

const here = dirname(fileURLToPath(import.meta.url));
const [answersFile, folder] = process.argv.slice(2);
if (!answersFile || !folder) {
  console.error("usage: node render.mjs ANSWERS FOLDER");
  process.exit(2);
}
const answers = readFileSync(answersFile, "utf8");
const dashboards = resolve(here, "../../../dashboards");
const work = mkdtempSync(join(tmpdir(), "boards-"));
mkdirSync(folder, { recursive: true });

const bundle = await build({
  entryPoints: [join(here, "board.jsx")],
  bundle: true,
  minify: true,
  write: false,
  format: "iife",
  jsx: "automatic",
  outfile: "board.js",
  loader: { ".svg": "dataurl", ".woff": "dataurl", ".woff2": "dataurl", ".ttf": "dataurl" },
  define: { "process.env.NODE_ENV": '"production"', global: "window" },
  logLevel: "error",
});
const script = bundle.outputFiles.find((file) => file.path.endsWith(".js")).text;
writeFileSync(join(work, "board.js"), script);
const style = readFileSync(join(here, "node_modules/uplot/dist/uPlot.min.css"), "utf8");
// "</" inside of a script would end it.
const inline = (text) => text.replaceAll("</", "<\\/");

for (const name of readdirSync(dashboards).filter((name) => name.endsWith(".json"))) {
  const board = JSON.parse(readFileSync(join(dashboards, name), "utf8"));
  const rows = Math.max(...board.panels.map((panel) => panel.gridPos.y + panel.gridPos.h));
  const height = TITLE + rows * CELL + 8;
  const page = join(work, `${name}.html`);
  writeFileSync(
    page,
    `<!doctype html><meta charset="utf-8"><title>${board.title}</title><style>${style}
      * { box-sizing: border-box; }
      body { margin: 0; background: #111217; color: #ccccdc; font: 14px Inter, "Helvetica Neue", Arial, sans-serif; }
      #board { position: relative; margin-top: ${TITLE}px; height: ${height - TITLE}px; }
      table { border-collapse: collapse; }
      button { font: inherit; color: inherit; background: none; border: 0; padding: 0; }
      ul { list-style: none; margin: 0; padding: 0; }
      #board svg { fill: currentcolor; }
    </style><div id="board"></div>
    <script>window.input = ${inline(JSON.stringify({ board, answers: JSON.parse(answers), width: WIDTH }))};</script>
    <script src="board.js"></script>`,
  );
  const picture = resolve(folder, `boards-${basename(name, ".json")}.png`);
  execFileSync(
    process.env.CHROMIUM ?? "chromium",
    [
      "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
      `--user-data-dir=${join(work, "profile")}`, `--window-size=${WIDTH},${height}`, "--virtual-time-budget=8000",
      "--allow-file-access-from-files", "--enable-logging=stderr", "--log-level=0",
      `--screenshot=${picture}`, pathToFileURL(page).href,
    ],
    { stdio: process.env.VERBOSE ? "inherit" : "ignore", timeout: 120_000 },
  );
  try {
    execFileSync("pngquant", ["--force", "--skip-if-larger", "--strip", "--speed", "1", "--output", picture, "128", picture]);
  } catch (reason) {
    if (reason.code !== "ENOENT") throw reason;
  }
  console.log(picture);
}
rmSync(work, { recursive: true, force: true });
