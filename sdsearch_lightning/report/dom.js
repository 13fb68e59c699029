// Elements and numbers. Text of the data only ever becomes a text node or a property, never markup.
"use strict";

const DATA = JSON.parse(document.getElementById("island").textContent);

// el("p.note", {title: "..."}, "text", child): properties are set by name, aria- and data- ones as attributes.
function el(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  made.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name.startsWith("data-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits = 2) => (isNumber(value) ? value.toFixed(digits).replace("-", "−") : "–");
const signed = (value, digits = 2) => (isNumber(value) && value >= 0 ? "+" : "") + fixed(value, digits);
const probability = (logprob) => (isNumber(logprob) ? Math.exp(logprob) : 0);
const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : share >= 0.001 ? (100 * share).toFixed(1) : "<0.1") + " %";

// The colour of a value: hue by its sign, strength by its size, `reach` being the full strength.
function tint(element, value, reach, hues = ["agree", "differ"]) {
  if (!isNumber(value)) return element;
  element.classList.add("tint", value >= 0 ? hues[0] : hues[1]);
  const strength = Math.min(1, Math.abs(value) / reach) ** 0.5;
  element.style.setProperty("--tint", `${Math.round(6 + 64 * strength)}%`);
  return element;
}
