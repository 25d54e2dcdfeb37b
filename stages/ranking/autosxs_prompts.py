"""Few-shot questions of AutoSxS, one for summaries and one for dialogues, in our own words (arXiv:2309.06657, A.4).

As there, each worked example has a context, two responses, an explanation and one of three choices: (A), (B) or same.
"""

CASE = """\
Context: {prompt}

Response (A): {a}

Response (B): {b}

Write the explanation in one or two sentences, and then, on a line of its own, `Choice: (A)`, `Choice: (B)` or \
`Choice: same`.

Explanation:"""

SUMMARY = (
    """\
Task: compare two short summaries of a text, and choose the better one: (A), (B), or same. A good summary says \
what matters most in the text, adds nothing that the text does not say, and wastes no words.

Context: My landlord raised the rent by 300 a month and gave us ten days to sign. We like the flat and the \
schools, but with the new rent we could no longer save anything. My wife wants to sign, I would rather look \
elsewhere. Is it normal to get so little time, and how would you decide?

Response (A): The landlord wants more rent and I am angry about it.

Response (B): Rent up by 300 and only ten days to sign; wife would stay, I would move. Is that notice normal, \
and how to decide?

Explanation: (A) leaves out the deadline, the disagreement and both questions, and says that the writer is \
angry, which the text does not. (B) has all of these in one sentence.

Choice: (B)

Context: I have run the same five kilometres three times a week for a year. My time went from 34 to 27 minutes \
by spring and has not moved since. I eat well and sleep eight hours. Do I have to run further, or faster, or \
both?

Response (A): After a year of running 5 km three times a week I am stuck at 27 minutes. Further, faster, or \
both?

Response (B): I run three times a week and my knees have hurt since spring, so should I stop running 5 km?

Explanation: (B) invents hurting knees and asks another question. (A) gives the state of things and the question \
as they are.

Choice: (A)

Context: Our book club of eight meets monthly and two members have not read the book for half a year. They come \
for the wine and talk over the others. Nobody wants to be the one to say something. How do we bring this up \
kindly?

Response (A): Two of our book club's eight members never read the book and talk over the rest. How can we raise \
it kindly?

Response (B): How do we kindly tell two members of our club of eight that they should read the book and let \
others speak?

Explanation: Both name the two members, what they do and the question, in about as many words. Neither adds \
anything.

Choice: same

"""
    + CASE
)

DIALOGUE = (
    """\
Task: someone talks to an assistant. Compare two answers to the last message, and choose the more helpful one: \
(A), (B), or same. A helpful answer is right, does what was asked, fits what was said before, and is as long as \
it needs to be.

Context: Human: I want to repaint a wooden garden bench. What do I do first?
Assistant: Sand off the loose paint and wipe away the dust.
Human: And if the wood is damp?

Response (A): Let it dry first: a few days under a roof, until a meter shows less than about 15 %. Paint on damp \
wood blisters.

Response (B): Sand off the loose paint and wipe away the dust, then paint the bench in a colour that you like.

Explanation: (A) answers the new question, with a time, a number and the reason. (B) repeats the earlier answer \
and passes over the damp.

Choice: (A)

Context: Human: How many teaspoons are in a tablespoon?

Response (A): That depends on many things, and cooking is an art. It is always best to taste as you go.

Response (B): Three. In Australia a tablespoon is larger: four teaspoons.

Explanation: (B) gives the number and its one exception. (A) does not answer.

Choice: (B)

Context: Human: Give me a word that rhymes with night.

Response (A): Light.

Response (B): Bright.

Explanation: Both rhyme, and each is one word, as was asked.

Choice: same

"""
    + CASE
)

TASKS = {"summary": SUMMARY, "dialogue": DIALOGUE}
