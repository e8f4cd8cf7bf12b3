# One line a kernel and architecture, from what ptxas -v prints.
/Compiling entry function/ {
  split($0, quoted, "'")
  name = quoted[2]
  target = quoted[4]
  ours = name ~ /^_ZN6lazydp/
}
/bytes stack frame/ { stack = $1; spills = $5 + $9 }
/Used [0-9]+ registers/ {
  match($0, /Used [0-9]+ registers/)
  registers = substr($0, RSTART + 5, RLENGTH - 15)
  shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH - 11) : 0
  printf "%s %s stack %d spills %d registers %d shared %d %s\n", ours ? "lazydp" : "cub", target, stack, spills, registers, shared, name
}
