# The packages of the lock file: read, downloaded, checked. Sourced, not run.

# Where checked packages wait for their part to be made; kept when something else fails, so that the next run need not download them again.
downloads=$images/.downloads

# The lock file's lines of each part, and of the current run: the file name, SHA-256, size and label (name and version) of each URI.
declare -A locked=()
declare -A file_of=() sum_of=() bytes_of=() label_of=()

read_lock() {
    local line part=""
    [[ -f $lock_file ]] || fail "$lock_file is missing, it names the packages that the images are made of: take it from the repository (git checkout), or write it anew by make lock"
    while IFS= read -r line; do
        case $line in
        "" | \#*) ;;
        \[*\]) part=${line//[\[\]]/} ;;
        *) locked[$part]+=$line$'\n' ;;
        esac
    done <"$lock_file"
    while IFS= read -r line; do
        part=${line//[\[\]]/}
        [[ $line != \[*\] || -n ${locked[$part]:-} ]] ||
            fail "$lock_file has no packages for the part $part, which the file packages names: take both from the repository (git checkout), or run make lock"
    done <"$here/packages"
}

# packages_of PART: its lines; none for a part that is made of others.
packages_of() { printf '%s' "${locked[$1]:-}"; }

# locked_mib PART...: the size of their packages.
locked_mib() {
    local part bytes total=0
    for part in "$@"; do
        while read -r _ _ _ _ bytes _; do total=$((total + bytes)); done < <(packages_of "$part")
    done
    echo $((total / 1048576 + 1))
}

# fetch PART...: what their lines name, to $downloads, each file checked.
fetch() {
    local part name version archive path bytes sum uri arguments=() total=0
    mkdir -p "$downloads"
    for part in "$@"; do
        while read -r name version archive path bytes sum; do
            [[ $sum =~ ^[0-9a-f]{64}$ ]] || fail "$lock_file has a line that is none, \"$name $version\" of $part: take it from the repository, or write it anew by make lock"
            find_archive "$archive"
            uri=${source_of[$archive]%% *}/$path
            [[ ${sum_of[$uri]:-$sum} == "$sum" ]] || fail "$lock_file has two checksums for $name $version: take it from the repository, or write it anew by make lock"
            [[ -z ${file_of[$uri]:-} ]] || continue
            file_of[$uri]=$downloads/${path##*/} sum_of[$uri]=$sum bytes_of[$uri]=$bytes label_of[$uri]="$name $version"
            # What an earlier run left is used if it is whole.
            ! is_whole "$uri" || continue
            arguments+=("$uri" "${file_of[$uri]}" "SHA256:$sum")
            total=$((total + bytes))
        done < <(packages_of "$part")
    done
    ((${#arguments[@]})) || return 0
    say "downloading $((${#arguments[@]} / 3)) packages, $((total / 1048576 + 1)) MiB"
    # What apt says is read below, so it has to be in English.
    LC_ALL=C timeout --kill-after=10 3600 /usr/lib/apt/apt-helper -o APT::Sandbox::User=root -o Acquire::Retries=2 \
        download-file "${arguments[@]}" >"$downloads/.log" 2>&1 || true
    check_downloads
}

# is_whole URI: whether its file is there and is what the lock file says.
is_whole() {
    local file=${file_of[$1]} found
    [[ -f $file && $(stat -Lc %s "$file") == "${bytes_of[$1]}" ]] || return 1
    read -r found _ < <(sha256sum "$file")
    [[ $found == "${sum_of[$1]}" ]]
}

# check_downloads: ends this run with the reasons, if not all files are there and right; one that is not right is removed.
check_downloads() {
    local uri file found reason gone=() changed=() missing=() free
    # apt takes what a full disk cut short for changed. Looked at while all of that still lies there.
    free=$(free_mib)
    for uri in "${!file_of[@]}"; do
        ! is_whole "$uri" || continue
        file=${file_of[$uri]}
        reason=$(grep -F -m 1 "E: Failed to fetch $uri " "$downloads/.log" | sed 's/^E: Failed to fetch [^ ]* *//') || true
        # apt puts what it refuses aside under this name.
        [[ ! -f $file.FAILED ]] || { mv -f "$file.FAILED" "$file"; reason=""; }
        if [[ -f $file && -z $reason ]]; then
            read -r found _ < <(sha256sum "$file")
            changed+=("${label_of[$uri]}: locked is ${sum_of[$uri]} (${bytes_of[$uri]} bytes), the archive gave $found ($(stat -c %s "$file") bytes)")
        elif [[ $reason =~ ^(404|410)\ |File\ not\ found ]]; then
            gone+=("${label_of[$uri]}")
        else
            missing+=("${label_of[$uri]}: ${reason:-$(tail -1 "$downloads/.log")}")
        fi
        rm -f "$file"
    done
    ((${#changed[@]} + ${#missing[@]} == 0 || free >= full_mib)) ||
        fail "the disk of $images became full while packages were downloaded: free some space, or make target a link to a bigger disk"
    ((${#changed[@]} == 0)) || fail "packages with another checksum than $lock_file has; they were not used and are removed:$(listed "${changed[@]}")
Look at who changed the lock file or the archive; if that was meant: make lock"
    ((${#missing[@]} == 0)) || fail "packages could not be downloaded (${#missing[@]} in all):$(listed "${missing[@]:0:3}")
Check the network, the proxy and the sources in /etc/apt, then run this again"
    ((${#gone[@]} == 0)) || fail "the archive moved on and no longer has:$(listed "${gone[@]}")
Run make lock to move to the newest versions, then run this again"
}

# listed LINE...: each on a line of its own, sorted.
listed() { printf '\n%s' "$(printf '    %s\n' "$@" | LC_ALL=C sort)"; }
