# Reads whole JSON files, strictly, without Python: prints `file <tab> dotted.key <tab> string|other <tab> value` for every
# scalar (strings as they stand in the file, escapes kept), or one line `file <tab> ! <tab> other <tab> reason` and nothing
# else for a file that is not one complete JSON object. Files that do not exist print nothing.
# Usage: LC_ALL=C awk -f json.awk file...
BEGIN {
  STRING = "^\"([^\"\\\\[:cntrl:]]|\\\\[\"\\\\/bfnrt]|\\\\u[0-9a-fA-F][0-9a-fA-F][0-9a-fA-F][0-9a-fA-F])*\""
  NUMBER = "^-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][-+]?[0-9]+)?"
  for (i = 1; i < ARGC; i++) read_file(ARGV[i])
  exit 0
}

function read_file(file,    line, status, lines) {
  fault = ""; depth = 0; expect = "start"; count = 0
  split("", seen)
  while ((status = (getline line < file)) > 0) {
    lines++
    read_line(line)
    if (fault != "") break
  }
  if (status == 0 || fault != "") {
    close(file)
    if (fault == "" && expect != "nothing") fault = lines ? "it ends in the middle" : "it is empty"
    if (fault != "") print file "\t!\tother\t" fault
    else for (lines = 1; lines <= count; lines++) print file "\t" out[lines]
  }
}

function read_line(line,    token) {
  for (;;) {
    sub(/^[ \t\r]+/, "", line)
    if (line == "" || fault != "") return
    if (match(line, STRING) || match(line, /^(true|false|null)/) || match(line, NUMBER)) {
      token = substr(line, 1, RLENGTH)
    } else {
      RLENGTH = 1
      token = substr(line, 1, 1)
    }
    line = substr(line, RLENGTH + 1)
    take(token)
  }
}

function wrong(token) { fault = "unexpected " substr(token, 1, 20) }

function take(token,    first, scalar) {
  first = substr(token, 1, 1)
  scalar = first == "\"" && length(token) > 1 || token ~ /^[-0-9tfn]./ || token ~ /^[0-9]$/
  if (expect == "start") {
    if (first == "{") open_container(first); else wrong(token)
  } else if (expect == "key" || expect == "key or end") {
    if (first == "\"" && scalar) {
      key[depth] = substr(token, 2, length(token) - 2)
      expect = "colon"
      if ((path() in seen)) fault = "the key " key[depth] " stands twice"
      seen[path()]
    } else if (first == "}" && expect == "key or end") close_container(first)
    else wrong(token)
  } else if (expect == "colon") {
    if (token == ":") expect = "value"; else wrong(token)
  } else if (expect == "value" || expect == "value or end") {
    if (first == "]" && expect == "value or end") close_container(first)
    else if (first == "{" || first == "[") open_container(first)
    else if (scalar) {
      if (first == "\"") out[++count] = path() "\tstring\t" substr(token, 2, length(token) - 2)
      else out[++count] = path() "\tother\t" token
      expect = "comma"
    } else wrong(token)
  } else if (expect == "comma") {
    if (token == ",") {
      if (kind[depth] == "[") { key[depth]++; expect = "value" } else expect = "key"
    } else close_container(first)
  } else wrong(token)
}

function open_container(bracket) {
  kind[++depth] = bracket
  key[depth] = bracket == "[" ? 0 : ""
  expect = bracket == "[" ? "value or end" : "key or end"
}

function close_container(bracket) {
  if (bracket != (kind[depth] == "[" ? "]" : "}")) { wrong(bracket); return }
  depth--
  expect = depth ? "comma" : "nothing"
}

function path(    level, text) {
  text = key[1]
  for (level = 2; level <= depth; level++) text = text "." key[level]
  return text
}
