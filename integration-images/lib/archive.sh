# The archives that this machine's own apt knows: packages come from the mirror it uses, through the proxy it uses. Sourced, not run.

# system_sources: "SUITE URI [OPTIONS]" for each binary source of the system's apt, from both formats of its files.
system_sources() {
    local settings list parts file
    settings=$(apt-config shell list Dir::Etc::sourcelist/f parts Dir::Etc::sourceparts/d) ||
        fail "apt's own configuration cannot be read (its message is above): mend /etc/apt, then run this again"
    eval "$settings"
    for file in "$list" "$parts"/*.list; do
        [[ -f $file ]] || continue
        awk '$1 == "deb" {
            options = ""
            first = 2
            if ($2 ~ /^\[/) {
                for (; first <= NF; first++) { options = options " " $first; if ($first ~ /\]$/) { first++; break } }
            }
            print $(first + 1), $first options
        }' "$file"
    done
    for file in "$parts"/*.sources; do
        [[ -f $file ]] || continue
        awk '
            function flush_stanza(   u, s, i, j, n, m) {
                if (types ~ /(^| )deb( |$)/ && enabled != "no") {
                    n = split(uris, u, " "); m = split(suites, s, " ")
                    for (i = 1; i <= n; i++) for (j = 1; j <= m; j++) print s[j], u[i] (options ? " [" options " ]" : "")
                }
                types = uris = suites = options = enabled = ""
            }
            /^#/ { next }
            /^[[:space:]]*$/ { flush_stanza(); next }
            {
                key = tolower($1); text = $0
                sub(/^[^:]*:[[:space:]]*/, "", text)
                if (key == "types:") types = text
                else if (key == "uris:") uris = text
                else if (key == "suites:") suites = text
                else if (key == "enabled:") enabled = tolower(text)
                else if (key == "signed-by:" && text ~ /^\/[^ ]*$/) options = options " signed-by=" text
                else if (key == "trusted:") options = options " trusted=" text
                else if (key == "check-valid-until:") options = options " check-valid-until=" text
            }
            END { flush_stanza() }' "$file"
    done
}

# The lock file's names of the archives, and a suite by which each is found among the sources. Backports lie in the main archive.
declare -A suite_of=([main]=bookworm [security]=bookworm-security)
declare -A source_of=()
sources=""

# find_archive NAME: its first source, "URI [OPTIONS]", to source_of[NAME].
find_archive() {
    local suite=${suite_of[$1]:-} name uri options
    [[ -n $suite ]] || fail "the archive \"$1\" is unknown, there are ${!suite_of[*]}: mend $lock_file, or write it anew by make lock"
    [[ -z ${source_of[$1]:-} ]] || return 0
    [[ -n $sources ]] || sources=$(system_sources) || exit 1
    while read -r name uri options; do
        [[ ${name%/} == "$suite" ]] || continue
        source_of[$1]="${uri%/}${options:+ $options}"
        return 0
    done <<<"$sources"
    fail "apt has no source with the suite $suite; the images are made of Debian 12 packages: add \"deb URI $suite main\" to /etc/apt/sources.list"
}
