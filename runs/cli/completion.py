"""Shell completion from the table of commands: a script without Python in it, so that Tab does not wait for torch.

source <(dreamloop --shell-completion bash)          # ~/.bashrc; zsh the same
dreamloop --shell-completion fish | source           # ~/.config/fish/config.fish
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from envs.errors import UserError
from envs.games import PROTOCOLS
from runs.cli.commands import OF_A_RUN
from runs.cli.table import RECIPE, RUN, Command, load
from runs.config import SIZES
from runs.config_types import keys
from runs.recipes import RECIPES, preset

SHELLS = ("bash", "zsh", "fish")
RUNS = """for one in runs/out/*/config.json; do
      [ -e "$one" ] && one=${one%/config.json} && echo "run=${one##*/}"; done"""
BASH = """\
_dreamloop() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" words command=train current candidates colon
  read -r -a words <<< "$line"
  current="${{line##* }}"
  case " {commands} " in *" ${{words[1]}} "*) command="${{words[1]}}";; esac
  case "$current" in
    run=*) candidates="$({runs})";;
{values}
    *) case "$command" in
{keys}
       esac
       [ "${{#words[@]}}" -le 2 ] && [ "${{words[1]}}" = "$current" ] && candidates="{commands} $candidates";;
  esac
  COMPREPLY=($(compgen -W "$candidates" -- "$current"))
  case "$current" in *=*) colon="${{current%=*}}="; COMPREPLY=("${{COMPREPLY[@]#"$colon"}}");; esac  # bash splits at =
}}
complete -o nospace -F _dreamloop dreamloop main.py"""
ZSH = """\
#compdef dreamloop main.py
_dreamloop() {{
  local command=train current="${{words[CURRENT]}}" candidates
  [[ " {commands} " == *" ${{words[2]}} "* ]] && command="${{words[2]}}"
  case "$current" in
    run=*) candidates="$({runs})";;
{values}
    *) case "$command" in
{keys}
       esac
       (( CURRENT == 2 )) && candidates="{commands} $candidates";;
  esac
  compadd -Q -S '' -- ${{(f)"$(print -l ${{=candidates}})"}}
}}
compdef _dreamloop dreamloop main.py"""
FISH = """\
function __dreamloop
  set -l words (commandline -opc)
  set -l command train
  contains -- "$words[2]" {commands}; and set command $words[2]
  switch (commandline -ct)
    case 'run=*'
      for one in runs/out/*/config.json; echo run=(basename (dirname $one)); end
{values}
    case '*'
      test (count $words) -eq 1; and printf '%s\\n' {commands}
      switch $command
{keys}
      end
  end
end
complete -c dreamloop -f -a '(__dreamloop)'"""


def script(words: Sequence[str], commands: Mapping[str, Command]) -> str:
    """The completion for the shell that the words name. Raises UserError when they name none."""
    named = [word.split("=")[-1] for word in words if not word.startswith("-") or "=" in word]
    if len(named) != 1 or named[0] not in SHELLS:
        raise UserError(f"Name one shell of {', '.join(SHELLS)}: python main.py --shell-completion bash")
    choices = {"recipe": tuple(RECIPES), "size": SIZES, "protocol": tuple(PROTOCOLS)}
    every = {name: " ".join(f"{key}=" for key in _keys(name, row)) for name, row in commands.items()}
    if named[0] == "fish":
        values = "\n".join(f"    case '{key}=*'\n      printf '%s\\n' " + " ".join(f"{key}={word}" for word in words)
                           for key, words in choices.items())  # fmt: skip
        listed = "\n".join(f"        case {name}\n          printf '%s\\n' {some}" for name, some in every.items())
        return FISH.format(commands=" ".join(commands), values=values, keys=listed)
    values = "\n".join(f'    {key}=*) candidates="' + " ".join(f"{key}={word}" for word in words) + '";;'
                       for key, words in choices.items())  # fmt: skip
    listed = "\n".join(f'         {name}) candidates="{some}";;' for name, some in every.items())
    template = BASH if named[0] == "bash" else ZSH
    return template.format(commands=" ".join(commands), values=values, keys=listed, runs=RUNS)


def _keys(name: str, row: Command) -> list[str]:
    if row.reads == RECIPE or row.passes_on:
        own = [] if row.reads == RECIPE else keys(load(row.reads)())
        named = ["name"] if name == "train" else []
        return list(dict.fromkeys([*own, *named, *(key for one in RECIPES for key in keys(preset(one, "xs")))]))
    if row.reads == RUN:
        own, may_change = OF_A_RUN[name]
        changed = [key for recipe in RECIPES for key in may_change(preset(recipe, "xs"))]
        return list(dict.fromkeys([*keys(own), *changed]))
    return keys(load(row.reads)())
