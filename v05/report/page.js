"use strict";
// Draws the page from its document: charts of the selected methods over the chosen axis, and completions by filter.

const AXES = { rollouts: "training rollouts", generated_tokens: "generated tokens", seconds: "training time (s)" };
const DASHES = ["solid", "dash", "dot", "dashdot"];
const SHOWN_AT_ONCE = 12;  // samples
const PRINTED = { width: 322, height: 220 };  // of a chart on paper, in pixels

const byId = (id) => document.getElementById(id);
const state = { axis: "rollouts", setting: null, hidden: new Set(), samples: SHOWN_AT_ONCE, printing: false };
let data = null;

// Charts. draw() returns traces and additions to the layout. Without traces, the card says that nothing was recorded.

const CHARTS = [
  {
    id: "accuracy", wide: true, title: "Held-out accuracy",
    note: "Mean over seeds at each evaluation; band: one standard deviation. Dotted line: the baseline's final accuracy, the target for 'rollouts saved'.",
    draw: (groups) => {
      const traces = curves(groups, "accuracy", { markers: true, format: ".3f" });
      const target = groups.map((g) => g.saved).find(Boolean);
      return { traces, layout: target ? level(target.target, `final of ${target.baseline}`) : {} };
    },
  },
  {
    id: "lead", title: "Accuracy over the best rival",
    note: "Accuracy minus that of the rival method that ended highest, at equal rollouts. Mean over seeds; band: one standard deviation.",
    draw: (groups) => {
      const traces = curves(groups, "lead", { markers: true, format: "+.3f" });
      const rival = groups.map((g) => g.lead).find(Boolean);
      return { traces, layout: rival ? level(0, rival.rival) : {} };
    },
  },
  {
    id: "noise", title: "Noise of the gradient",
    note: "Second moment of one rollout's gradient divided by the mean energy, as far as the engine knows energies; smoothed. Lower is better: half the noise is worth twice the rollouts.",
    draw: (groups) => ({ traces: curves(groups, "gradient_noise", { format: ".3f" }), layout: { yaxis: { rangemode: "tozero" } } }),
  },
  {
    id: "saved", wide: true, title: "Rollouts to the baseline's final accuracy",
    note: "Training rollouts after which the mean curve stays at or above the baseline's final accuracy; fewer are better. Lines: 95 % interval over seeds, which reaches the right edge if some resampled curves never get there. Dotted: rollouts that the baseline itself needed.",
    draw: drawSaved,
  },
  {
    id: "group-size", title: "Rollouts per prompt",
    note: "Mean over the prompts of each step, smoothed.",
    draw: (groups) => ({ traces: curves(groups, "group_size", { format: ".2f" }), layout: { yaxis: { rangemode: "tozero" } } }),
  },
  {
    id: "group-sizes", title: "Distribution of group sizes",
    note: "Share of all groups of the run that ended with this number of rollouts.",
    draw: drawGroupSizes,
  },
  {
    id: "calibration", title: "Prior against outcome",
    note: "Groups of the second half of the run, by predicted success rate. Outcome: mean reward of a group's first rollouts, before any test. On the dotted diagonal, predictions are right on average. Area of a point: number of groups.",
    draw: drawCalibration,
  },
  {
    id: "prior-auc", title: "How well the prior ranks held-out prompts",
    note: "AUC: how often the prior ranks a prompt that is solved more than half the time above one that is not. 1 is perfect, 0.5 is chance.",
    draw: (groups) => ({ traces: curves(groups, "prior_auc", { markers: true, format: ".3f" }), layout: {} }),
  },
  {
    id: "rejected", title: "Priors rejected",
    note: "Share of groups whose prior the test rejects (v05), or whose prior hallucinates with probability above 1/2 (calibrated).",
    draw: (groups) => ({
      traces: curves(groups, "rejected", { format: ".1%" }),
      layout: { yaxis: { tickformat: ".0%", rangemode: "tozero" } },
    }),
  },
  {
    id: "weight", title: "Weight against the prior over time",
    note: "Mean over groups of the weight of the group mean (v05), or of the probability that the prior hallucinates (calibrated). 0 trusts the prior fully.",
    draw: (groups) => ({ traces: curves(groups, "weight", { format: ".3f" }), layout: { yaxis: { rangemode: "tozero" } } }),
  },
  {
    id: "weights", title: "Distribution of these weights",
    note: "Share of all groups of the run, by tenths of the weight.",
    draw: (groups) => ({
      traces: groups.filter((g) => g.weights).map((g) => bars(g, g.weights.map((_, i) => (i + 0.5) / 10), g.weights, "%{x:.2f} ± 0.05")),
      layout: { barmode: "group", yaxis: { tickformat: ".0%" }, xaxis: { range: [0, 1], title: { text: "weight" } } },
    }),
  },
  {
    id: "gradient", title: "Gradient norm",
    note: "Norm of the gradient before clipping, smoothed. Band: one standard deviation over seeds.",
    draw: (groups) => ({ traces: curves(groups, "grad_norm", { format: ".3f" }), layout: { yaxis: { rangemode: "tozero" } } }),
  },
  {
    id: "entropy", title: "Entropy",
    note: "Entropy of the policy on held-out prompts, in nats per token. A fast fall means that completions become alike.",
    draw: (groups) => ({ traces: curves(groups, "entropy", { markers: true, format: ".3f" }), layout: {} }),
  },
  {
    id: "baseline", title: "Error of the baseline",
    note: "Mean squared error of the baseline against the success rate in many fresh rollouts of the same policy, in squared reward units. Methods none, batch_energy and optimal aim at another baseline, so their error may be large.",
    draw: (groups) => ({ traces: curves(groups, "baseline_mse", { markers: true, format: ".4f" }), layout: { yaxis: { rangemode: "tozero" } } }),
  },
  {
    id: "stages", wide: true, title: "Training time by stage",
    note: "Seconds per 1,000 rollouts. Schedule: time of the sampling loop outside the engine and the verifier.",
    draw: drawStages,
  },
];

function curves(groups, key, { markers = false, format }) {
  const known = groups.filter((g) => g[key] && g[key].mean.length && g[key][state.axis]);
  const bands = known.filter((g) => g[key].spread).map((g) => {
    const { mean, spread } = g[key], x = g[key][state.axis];
    return {
      x: [...x, ...x.slice().reverse()],
      y: [...mean.map((m, i) => m + spread[i]), ...mean.map((m, i) => m - spread[i]).reverse()],
      type: "scatter", mode: "lines", fill: "toself", fillcolor: colour(g) + "26", line: { width: 0, color: colour(g) }, hoverinfo: "skip",
    };
  });
  const lines = known.map((g) => ({
    x: g[key][state.axis], y: g[key].mean, name: g.name, type: "scatter", mode: markers ? "lines+markers" : "lines",
    line: { color: colour(g), width: 2, dash: DASHES[g.variant % DASHES.length] }, marker: { size: 5 }, opacity: g.finished ? 1 : 0.6,
    hovertemplate: `<b>${escaped(g.name)}</b><br>%{y:${format}} at %{x:,.4~s}<extra></extra>`,
  }));
  return [...bands, ...lines];
}

function bars(group, x, y, where) {
  return {
    x, y, name: group.name, type: "bar", marker: { color: colour(group) },
    hovertemplate: `<b>${escaped(group.name)}</b><br>${where}: %{y:.1%}<extra></extra>`,
  };
}

function drawSaved(groups) {
  const known = groups.filter((g) => g.saved).reverse();
  if (!known.length) return { traces: [], layout: {} };
  const needed = known[0].saved.needed;
  const end = Math.max(needed, ...known.map((g) => g.rollouts));
  const text = (s) => (s.rollouts === null ? "never" : number(s.rollouts));
  return {
    traces: [{
      type: "bar", orientation: "h", y: known.map((g) => g.name), x: known.map((g) => (g.saved.rollouts === null ? 0 : g.saved.rollouts)),
      marker: { color: known.map(colour) }, text: known.map((g) => text(g.saved)), textposition: known.map((g) => (g.saved.rollouts === null ? "outside" : "inside")), insidetextanchor: "start", textangle: 0,
      insidetextfont: { color: isDark() ? "#10151d" : "#fff" }, outsidetextfont: { color: css("--soft") }, cliponaxis: false,
      error_x: {
        type: "data", symmetric: false, color: ink(), thickness: 1.2, width: 4,
        array: known.map((g) => (g.saved.rollouts === null ? 0 : (g.saved.high === null ? end : g.saved.high) - g.saved.rollouts)),
        arrayminus: known.map((g) => (g.saved.rollouts === null ? 0 : g.saved.rollouts - (g.saved.low === null ? 0 : g.saved.low))),
      },
      customdata: known.map((g) => [g.saved.low, g.saved.high].map((x) => (x === null ? "never" : number(x))).join(" to ")),
      hovertemplate: "<b>%{y}</b><br>%{text}, 95 %: %{customdata}<extra></extra>",
    }],
    layout: {
      xaxis: { title: { text: "training rollouts" }, tickformat: "~s", range: [0, end * 1.04] },
      ...named(known),
      shapes: [{ type: "line", x0: needed, x1: needed, y0: 0, y1: 1, yref: "paper", line: { color: css("--soft"), width: 1.2, dash: "dot" } }],
    },
  };
}

function drawGroupSizes(groups) {
  const known = groups.filter((g) => g.group_sizes);
  const most = Math.max(0, ...known.map((g) => g.group_sizes.length - 1));
  const least = Math.min(...known.map((g) => g.group_sizes.findIndex((share) => share > 0)));
  return {
    traces: known.map((g) => {
      const sizes = g.group_sizes.map((_, size) => size).slice(least);
      return { ...bars(g, sizes, g.group_sizes.slice(least), "%{x} rollouts"), opacity: 0.7 };
    }),
    layout: { barmode: "overlay", xaxis: { title: { text: "rollouts in a group" }, dtick: most > 24 ? undefined : 1 }, yaxis: { tickformat: ".0%" } },
  };
}

function drawCalibration(groups) {
  const known = groups.filter((g) => g.calibration);
  if (!known.length) return { traces: [], layout: {} };
  const diagonal = {
    x: [0, 1], y: [0, 1], type: "scatter", mode: "lines", line: { color: css("--soft"), width: 1, dash: "dot" }, hoverinfo: "skip",
  };
  return {
    traces: [diagonal, ...known.map((g) => {
      const most = Math.max(...g.calibration.map(([count]) => count));
      return {
        x: g.calibration.map(([, prior]) => prior), y: g.calibration.map(([, , outcome]) => outcome), name: g.name,
        type: "scatter", mode: "lines+markers", line: { color: colour(g), width: 1.5, dash: DASHES[g.variant % DASHES.length] },
        marker: { size: g.calibration.map(([count]) => 4 + 14 * Math.sqrt(count / most)), opacity: 0.75, line: { width: 0 } },
        text: g.calibration.map(([count]) => number(count)),
        hovertemplate: `<b>${escaped(g.name)}</b><br>predicted %{x:.2f}, outcome %{y:.2f}<br>%{text} groups<extra></extra>`,
      };
    })],
    layout: { xaxis: { range: [-0.03, 1.03], title: { text: "prior" } }, yaxis: { range: [-0.03, 1.03], title: { text: "outcome" } } },
  };
}

function drawStages(groups) {
  const known = groups.slice().reverse();
  const palette = css("--stages").split(" ");
  const names = Object.keys(known.length ? known[0].stages : {});
  return {
    traces: names.map((stage, i) => ({
      type: "bar", orientation: "h", name: stage, y: known.map((g) => g.name), x: known.map((g) => g.stages[stage]),
      marker: { color: palette[i % palette.length] }, hovertemplate: `<b>%{y}</b><br>${stage}: %{x:.3f} s<extra></extra>`,
    })),
    layout: {
      barmode: "stack", showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" },
      xaxis: { title: { text: "seconds" } }, ...named(known, 30),
    },
  };
}

function named(groups, top = 10) {  // leaves room for the groups' names to the left of their bars
  const longest = Math.max(...groups.map((g) => g.name.length));
  return { margin: { l: Math.min(260, 16 + (state.printing ? 5.2 : 6.8) * longest), r: 14, t: top, b: 44, autoexpand: false }, yaxis: { ticks: "", showgrid: false } };
}

function level(y, text) {
  return {
    shapes: [{ type: "line", x0: 0, x1: 1, xref: "paper", y0: y, y1: y, line: { color: css("--soft"), width: 1.2, dash: "dot" } }],
    annotations: [{ text: escaped(text), x: 0, xref: "paper", xanchor: "left", y, yanchor: "bottom", showarrow: false, font: { size: 11, color: css("--soft") } }],
  };
}

// Helpers.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const ink = () => css("--ink");
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches && !state.printing;
const colour = (group) => group.colours[isDark() ? 1 : 0];
const escaped = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);  // plotly interprets some markup
const number = (x) => Math.round(x).toLocaleString("en-US");
const fixed = (x, digits) => (x === null || x === undefined ? "" : x.toFixed(digits));
const percent = (x) => (x === null || x === undefined ? "" : `${(100 * x).toFixed(0)} %`);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function table(columns, rows) {
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, ...[cell].flat())))))));
}

const dot = (group) => make("span", { class: "dot", style: `--colour:${colour(group)}` });

// The parts of the page.

const settings = () => [...new Set(data.groups.map((g) => g.setting))];
const inSetting = () => data.groups.filter((g) => g.setting === state.setting);
const visible = () => inSetting().filter((g) => !state.hidden.has(g.name));

function drawCharts() {
  const base = {
    autosize: true, margin: { l: 52, r: 14, t: 10, b: 44, autoexpand: false }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: state.printing ? 9 : 12, color: css("--soft") }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: ink() } }, bargap: 0.25,
    ...(state.printing ? PRINTED : {}),
  };
  const line = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false };
  for (const chart of CHARTS) {
    const card = byId(`chart-${chart.id}`), plot = card.querySelector(".plot"), empty = card.querySelector(".empty");
    const { traces, layout } = chart.draw(visible());
    empty.hidden = traces.length > 0;
    plot.hidden = traces.length === 0;
    if (!traces.length) {
      Plotly.purge(plot);
      continue;
    }
    const over = { title: { text: AXES[state.axis] }, tickformat: "~s", rangemode: "tozero" };
    const whole = { ...base, ...layout, xaxis: { ...line, ...(layout.xaxis || over) }, yaxis: { ...line, ...layout.yaxis } };
    if (chart.id === "stages" || chart.id === "saved") {
      plot.style.height = state.printing ? "" : `${110 + 30 * visible().length}px`;
    }
    Plotly.react(plot, traces, whole, { displaylogo: false, responsive: true, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
  }
}

function drawSummary() {
  const groups = inSetting();
  const reference = groups.map((g) => g.saved).find(Boolean);
  const columns = ["method", "seeds", "held-out accuracy", "gain", ...(reference ? [`rollouts to ${reference.baseline}'s final`, "saved"] : []),
    "rollouts per prompt", "priors rejected", "rollouts/s", "seconds"];
  const rows = groups.map((g) => {
    const reached = g.saved && g.saved.rollouts;
    return [
      [dot(g), g.name, ...(g.finished ? [] : [make("span", { class: "faint" }, " unfinished")])],
      String(g.seeds),
      fixed(g.final, 3) + (g.final_spread === null ? "" : ` ± ${fixed(g.final_spread, 3)}`),
      (g.final >= g.before ? "+" : "−") + fixed(Math.abs(g.final - g.before), 3),
      ...(reference ? [g.saved ? (reached === null ? "never" : number(reached)) : "",
        g.saved && reached !== null && g.name !== reference.baseline ? percent(1 - reached / g.saved.needed) : ""] : []),
      fixed(g.mean_group_size, 1), percent(g.mean_rejected), g.speed === null ? "" : number(g.speed), number(g.seconds),
    ];
  });
  byId("summary").replaceChildren(
    make("h2", {}, "Methods"),
    make("p", { class: "note" }, "Means over seeds at the end, ± one standard deviation. Gain: increase over the accuracy before training."),
    table(columns, rows));
}

function drawRuns() {
  const rows = data.runs.map((r) => [
    r.name, r.label, String(r.seed), r.finished ? "finished" : `unfinished, ${percent(r.share)}`, fixed(r.accuracy_before, 3),
    fixed(r.accuracy_after, 3), number(r.rollouts), number(r.steps), number(r.seconds), number(r.failures),
  ]);
  const columns = ["run", "method", "seed", "status", "accuracy before", "after", "rollouts", "steps", "seconds", "failed rollouts"];
  byId("runs").replaceChildren(make("details", rows.length <= 12 ? { open: "" } : {}, make("summary", {}, `Runs (${rows.length})`), table(columns, rows)));
}

function drawMethods() {
  byId("methods").replaceChildren(...inSetting().map((g) => {
    const button = make("button", { type: "button", "aria-pressed": String(!state.hidden.has(g.name)), title: "click: show or hide; double click: show only this method" },
      dot(g), g.name + (g.finished ? "" : " (unfinished)"));
    button.addEventListener("click", () => {
      if (!state.hidden.delete(g.name)) state.hidden.add(g.name);
      drawChoice();
    });
    button.addEventListener("dblclick", () => {
      const others = inSetting().map((other) => other.name).filter((name) => name !== g.name);
      state.hidden = new Set(others);
      drawChoice();
    });
    return button;
  }));
}

function drawChoice() {
  const buttons = [...byId("methods").children];
  inSetting().forEach((g, i) => buttons[i].setAttribute("aria-pressed", String(!state.hidden.has(g.name))));
  for (const button of byId("axes").children) button.setAttribute("aria-pressed", String(button.value === state.axis));
  drawCharts();
}

function drawAll() {
  drawMethods();
  drawSummary();
  drawChoice();
}

// Completions.

function options(select, values, all) {
  select.replaceChildren(make("option", { value: "" }, all), ...values.map(([value, text]) => make("option", { value }, text)));
}

const REWARDS = { right: ["right (1)", (r) => r === 1], wrong: ["wrong (0)", (r) => r === 0], other: ["neither", (r) => r !== 0 && r !== 1] };

function matching() {
  const run = byId("filter-run").value, step = byId("filter-step").value, reward = byId("filter-reward").value;
  const text = byId("filter-text").value.toLowerCase();
  const fits = (completion) => !reward || REWARDS[reward][1](completion.reward);
  const contains = (s) => !text || s.prompt.toLowerCase().includes(text) || s.completions.some((c) => c.text.toLowerCase().includes(text));
  return data.samples
    .filter((s) => (!run || s.run === run) && (!step || String(s.step) === step) && contains(s))
    .map((s) => ({ ...s, completions: s.completions.filter(fits) }))
    .filter((s) => s.completions.length);
}

function signed(x) {
  return (x < 0 ? "−" : "+") + Math.abs(x).toFixed(3);
}

function sampleCard(s) {
  const fact = (name, value) => (value === null || value === undefined ? null : make("span", {}, `${name} `, make("b", {}, value)));
  const known = (x) => (x === null ? null : x.toFixed(3));
  const text = (content) => make("pre", { class: "text" }, content);
  return make("article", { class: "sample" },
    make("header", {}, make("b", {}, s.run), fact("step", String(s.step)), fact("prior", known(s.prior)),
      fact("group of", String(s.size)), fact("mean", known(s.mean)), fact("baseline", known(s.baseline))),
    make("div", { class: "body" },
      make("div", { class: "asked" }, make("h3", {}, "prompt"), text(s.prompt), make("h3", {}, "answer"), text(s.answer)),
      make("div", {}, ...s.completions.map((c) => make("div", { class: "completion" },
        make("span", { class: `reward ${c.reward === 1 ? "right" : c.reward === 0 ? "wrong" : ""}`, title: "reward" }, fixed(c.reward, c.reward % 1 ? 2 : 0)),
        make("span", { class: "advantage", title: "advantage" }, c.advantage === null ? "" : signed(c.advantage)),
        text(c.text))))));
}

function drawSamples() {
  const found = matching();
  byId("found").value = `${number(found.length)} of ${number(data.samples.length)} groups`;
  byId("samples").replaceChildren(...found.slice(0, state.samples).map(sampleCard));
  byId("more").hidden = found.length <= state.samples;
}

function setUpSamples() {
  if (!data.samples.length) {
    byId("completions-note").textContent = "These runs recorded no completions.";
    byId("filters").hidden = byId("more").hidden = true;
    return;
  }
  const cut = data.sampled > data.samples.length ? ` ${number(data.samples.length)} of the ${number(data.sampled)} recorded groups are on this page, evenly chosen.` : "";
  byId("completions-note").textContent = "A few groups from each step that followed an evaluation. Each line is one completion with its reward and its advantage." + cut;
  const steps = () => {
    const run = byId("filter-run").value;
    const known = new Set(data.samples.filter((s) => !run || s.run === run).map((s) => s.step));
    options(byId("filter-step"), [...known].sort((a, b) => a - b).map((s) => [String(s), String(s)]), "all");
  };
  options(byId("filter-run"), [...new Set(data.samples.map((s) => s.run))].map((name) => [name, name]), "all");
  options(byId("filter-reward"), Object.entries(REWARDS).map(([value, [text]]) => [value, text]), "any");
  steps();
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", (event) => {
    if (event.target.id === "filter-run") steps();
    state.samples = SHOWN_AT_ONCE;
    drawSamples();
  });
  byId("more").addEventListener("click", () => {
    state.samples += SHOWN_AT_ONCE;
    drawSamples();
  });
  drawSamples();
}

// Set-up.

function setUp() {
  state.setting = settings()[0];
  const unfinished = data.runs.filter((r) => !r.finished).length;
  byId("overview").textContent = `${data.runs.length} run${data.runs.length === 1 ? "" : "s"} of ${new Set(data.groups.map((g) => g.name)).size} `
    + `method${data.groups.length === 1 ? "" : "s"}` + (settings().length > 1 ? ` on ${settings().length} tasks` : ` on ${state.setting}`);
  const notices = [...(unfinished ? [`${unfinished} of ${data.runs.length} runs ${unfinished === 1 ? "is" : "are"} unfinished. Curves of a method use its finished runs if it has any.`] : []), ...data.missing];
  byId("notices").replaceChildren(...notices.map((text) => make("li", {}, text)));
  byId("setting-label").hidden = settings().length < 2;
  byId("setting").replaceChildren(...settings().map((name) => make("option", { value: name }, name)));
  byId("setting").addEventListener("change", (event) => {
    state.setting = event.target.value;
    drawAll();
  });
  const recorded = Object.keys(AXES).filter((axis) => data.groups.some((g) => g.accuracy && g.accuracy[axis]));
  byId("axes").replaceChildren(...recorded.map((axis) => {
    const button = make("button", { type: "button", value: axis }, { rollouts: "rollouts", generated_tokens: "tokens", seconds: "seconds" }[axis]);
    button.addEventListener("click", () => {
      state.axis = axis;
      drawChoice();
    });
    return button;
  }));
  byId("charts").replaceChildren(...CHARTS.map((chart) => make("div", { class: `chart${chart.wide ? " wide" : ""}`, id: `chart-${chart.id}` },
    make("h2", {}, chart.title), make("p", { class: "note" }, chart.note), make("div", { class: "plot" }),
    make("div", { class: "empty", hidden: "" }, "The methods shown did not record this."))));
  drawRuns();
  setUpSamples();
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const print = (on) => () => {
    state.printing = on;
    document.documentElement.classList.toggle("print", on);
    drawAll();
  };
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

(async () => {
  data = JSON.parse(await unpack("document"));
  document.head.append(Object.assign(document.createElement("script"), { textContent: await unpack("plotly") }));
  setUp();
  document.documentElement.dataset.ready = "";
})();
