"""Plain words to write prompts with: most tokenizers give each of them one token."""

from __future__ import annotations

_TEXT = """
able about above across after again almost along also always among animal answer area away back
ball bank base bear beat been before began behind being below best better bird black blood blue
board boat body bone book born both break bridge bring brown build burn busy call came camp card
care carry case catch cause cell center chair chance change check child choose church circle
city class clean clear climb clock close cloud coast cold color come common cook cool copy corn
corner cost could count course cover cross crowd dance dark dead deal dear deep degree desert
differ dinner doctor does done door down draw dream dress drink drive drop during duty each
early earth east easy edge effect eight either else energy engine enough equal even event ever
every exact face fact fall family famous farm fast father fear feed feel feet fell field fight
figure fill final find fine finger finish fire first fish five flat floor flow flower follow
food foot force forest form found four free fresh friend from front fruit full game garden gave
girl give glad glass gold gone good grand grass gray great green grew ground group grow guess
guide hair half hand happy hard have head hear heart heat heavy held help here high hill hold
hole home hope horse hour house huge human hunt idea inch into iron island join jump just keep
kept kill kind king knew know lady lake land large last late laugh lead learn least leave left
length less letter level life lift light like line list listen little live long look lost loud
love made main make many mark market master match matter mean meat meet metal method middle
might mile milk mind mine minute miss modern moment money month moon more most mother motion
mount mouth move much music must name nation nature near neck need never next night nine noise
north nose note notice noun number object ocean offer office often once only open order other
over page paint pair paper parent part party pass past path people period person piece place
plain plan plane planet plant play please point poor port post pound power press pretty print
proper prove pull push quick quiet quite race radio rain raise range rather reach read ready
real reason record region repeat reply rest result rich ride right ring rise river road rock
roll room root rope rose round rule safe said sail salt same sand save scale school season seat
second seed seem sell send sense sent serve settle seven shall shape share sharp sheet ship shoe
shop shore short should shout show side sight sign silent silver simple since sing single sister
size skill skin sleep slow small smell smile snow soft soil solve some song soon sound south
space speak speech speed spell spend spoke spot spread spring square stand star start state stay
steam steel step stick still stone stood stop store story stream street string strong study such
sudden sugar suit summer supply sure swim symbol system table tail take talk tall teach team
tell term test than thank that their them then there these they thick thin thing think third
this those though three time tiny tire told tone took tool total touch toward town track trade
train travel tree trip truck true tube turn twenty type under unit until usual valley value vary
very view visit voice wait walk wall want warm wash watch water wave wear week weight well went
were west wheel when where which while white whole whose wide wife wild will wind window wing
winter wire wish with woman wonder wood word work world would write wrong year yellow young
"""
WORDS = tuple(_TEXT.split())
