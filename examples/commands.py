"""Writes commands.csv: what the users of an assistant say, and which of their own commands they mean.

    python examples/commands.py [FOLDER]

Each of 24 users has five commands of their own, called c1 to c5, so a label of one user is not that of another. commands.csv
has the columns user, said and command. my-commands.csv is a device that comes later, with five sentences of each command;
new-sentences.csv is what its user says next.
"""

import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

SAID = {
    "light on": (
        "turn the lamp on|it is dark in here|lights please|switch on the lamp|make it bright|lamp on|"
        "can i have some light|light up the room"
    ),
    "light off": (
        "turn the lamp off|too bright in here|lights out please|switch off the lamp|make it dark|lamp off|"
        "no more light|darken the room"
    ),
    "music": (
        "play some music|i want to hear a song|put on my favourite band|start the playlist|music please|"
        "play a tune|sing something|let us hear jazz"
    ),
    "silence": (
        "stop the music|be quiet|no more songs|pause the playlist|silence please|mute it|turn the sound off|i need it quiet"
    ),
    "weather": (
        "will it rain today|what is the weather like|do i need an umbrella|how cold is it outside|is it sunny|"
        "tell me the forecast|how warm will it get|any snow coming"
    ),
    "alarm": (
        "wake me at seven|set an alarm for six|i have to get up early|alarm at half past eight|"
        "do not let me oversleep|ring at nine|wake me up tomorrow|set my alarm clock"
    ),
    "timer": (
        "set a timer for ten minutes|count down from five|tell me when the eggs are done|remind me in an hour|"
        "start a timer|timer for the oven|three minutes please|how long until the tea is ready"
    ),
    "shopping": (
        "put milk on the list|we need bread|add eggs to the shopping list|i am out of coffee|"
        "write down butter|buy more apples|we ran out of soap|note that we need rice"
    ),
    "calendar": (
        "what is on today|when is my next meeting|am i free on friday|show my calendar|"
        "do i have an appointment|what is planned tomorrow|which day is the dentist|any events this week"
    ),
    "message": (
        "send a message to anna|tell mum i am late|write to my brother|text paul that i am here|"
        "message the team|let her know i left|send him a note|write a text to grandma"
    ),
    "call": (
        "call my sister|ring the doctor|phone the office|dial home|get dad on the line|make a phone call|"
        "call the pizza place|connect me with support"
    ),
    "heating": (
        "make it warmer|turn the heating up|i am freezing|raise the temperature|set it to twenty two degrees|"
        "heat the bathroom|it is cold in here|warm up the bedroom"
    ),
    "blinds": (
        "open the blinds|let the sun in|pull up the shutters|blinds up please|close the blinds|"
        "lower the shutters|shut the curtains|open the curtains"
    ),
    "news": (
        "what happened today|read me the news|any headlines|tell me what is new|news please|"
        "what is going on in the world|latest headlines|give me the news of the hour"
    ),
    "route": (
        "how do i get to the station|navigate home|what is the fastest way to work|is there traffic|"
        "show me the route|directions to the airport|how far is the beach|take me to the museum"
    ),
    "joke": (
        "tell me a joke|make me laugh|say something funny|i need cheering up|another joke please|"
        "do you know a funny story|be funny|amuse me"
    ),
}
"""Eight sentences for each of sixteen commands."""
USERS, OWN, LATER = 24, 5, 5
"""Users, commands of each, and sentences of a command that the later device has."""


def rows(user: str, rng: random.Random) -> list[tuple[str, str, str]]:
    """Return (user, said, command) of all sentences of one user, in random order."""
    own = rng.sample(sorted(SAID), OWN)
    found = [(user, said, f"c{number}") for number, name in enumerate(own, start=1) for said in SAID[name].split("|")]
    rng.shuffle(found)
    return found


def write(path: Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])


def rows_of_me() -> list[tuple[str, str, str]]:
    """Return the sentences of the device that comes later."""
    return rows("me", random.Random(1))


def write_all(folder: Path) -> None:
    """Write the three files. They are the same every time."""
    rng = random.Random(0)
    write(
        folder / "commands.csv", ("user", "said", "command"), [row for at in range(USERS) for row in rows(f"user-{at:02}", rng)]
    )
    mine: list[tuple[str, str, str]] = []
    later: list[tuple[str, str, str]] = []
    for row in rows_of_me():
        enough = sum(one[2] == row[2] for one in mine) >= LATER
        (later if enough else mine).append(row)
    write(folder / "my-commands.csv", ("user", "said", "command"), mine)
    write(folder / "new-sentences.csv", ("user", "said"), [row[:2] for row in later])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    write_all(target)
    print(f"{target / 'commands.csv'}, {target / 'my-commands.csv'}, {target / 'new-sentences.csv'}")
