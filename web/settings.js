// The pack's page in ComfyUI's settings. nodes/comfyui/settings.py reads what it says; locales/*/settings.json translate it.

const PAGE = "ParallelDiT";
const HERE = "Ranks of this machine";
const ELSEWHERE = "A sidecar on another machine";

/** What `registerExtension` takes as `settings`. `onChange` is called after each change, and once for each at start. */
export function settingsPage(onChange) {
  const all = [
    {
      id: "ParallelDiT.Ranks",
      group: HERE,
      name: "Ranks",
      tooltip: "Processes that work on a picture where Parallel Layout's ranks is 0. 0: all GPUs, or 2 on a machine without GPU.",
      type: "number",
      defaultValue: 0,
      attrs: { min: 0, max: 1024, maxFractionDigits: 0 },
    },
    {
      id: "ParallelDiT.IdleMinutes",
      group: HERE,
      name: "Idle time (minutes)",
      tooltip: "After so long without a request the ranks end; the next prompt starts them again. 0: never.",
      type: "number",
      defaultValue: 30,
      attrs: { min: 0, max: 1000000, maxFractionDigits: 1 },
    },
    {
      id: "ParallelDiT.RemoteAddress",
      group: ELSEWHERE,
      name: "Address",
      tooltip: "tcp://host:port of a sidecar that was started there. Empty: the ranks of this machine.",
      type: "text",
      defaultValue: "",
    },
    {
      id: "ParallelDiT.TokenFile",
      group: ELSEWHERE,
      name: "Token file",
      tooltip: "The path, on the machine of ComfyUI, of the file with that sidecar's token. Never write the token itself here.",
      type: "text",
      defaultValue: "",
    },
  ];
  return all.map(({ group, ...each }, index) => ({
    ...each,
    category: [PAGE, group, each.name],
    sortOrder: all.length - index, // the highest is shown first
    onChange,
  }));
}
